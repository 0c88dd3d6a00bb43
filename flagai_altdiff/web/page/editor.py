"""The editor of the page, which decodes pictures as every other door does: Gradio's takes any format and size."""

from __future__ import annotations

import io
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs, EditorData, EditorValue
from gradio.data_classes import FileData
from PIL import Image
from starlette.exceptions import HTTPException

from flagai_altdiff.decoding import read_image, reading
from flagai_altdiff.errors import BrokenExampleError, DataError
from flagai_altdiff.files import open_regular

_LAYERS = 4
"""Of a picture; people paint on one."""
_HELD = 16
"""Pictures that were sent and are not drawn with yet, of all people together."""


class _Unwritten(ComponentMeta):
    """Makes a component without the interface file that Gradio would write beside this one."""

    def __new__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, Any]) -> Any:
        return ABCMeta.__new__(cls, name, bases, attrs)


def picture_editor(max_pixels: int) -> type[gr.ImageEditor]:
    """The editor's class; Gradio makes it anew with the same arguments when its language changes.

    Args:
        max_pixels: Of a picture, and of each layer.
    """

    class Editor(gr.ImageEditor, metaclass=_Unwritten):
        is_template = True  # so the browser shows it as the class that it is made from

        def preprocess(self, payload: EditorData | None) -> EditorValue | None:
            """As the original, without the composite, which nobody looks at."""
            given = self.blob_storage.get(payload.id) if payload and payload.id else payload
            if given is not None:
                if len(given.layers) > _LAYERS:
                    raise gr.Error(f"expected at most {_LAYERS} layers", print_exception=False)
                given.composite = None
            return super().preprocess(payload)

        def convert_and_format_image(
            self, file: FileData | bytes | None, flatten_on_white: bool = False
        ) -> Image.Image | None:
            """A picture or layer, transparent where it was."""
            if file is None:
                return None
            try:
                with reading("the picture"), _opened(file) as opened:
                    return read_image(opened, "the picture", max_pixels=max_pixels, keep_alpha=True)
            except (BrokenExampleError, DataError) as error:
                raise gr.Error(str(error), print_exception=False) from error

        @server  # type: ignore[untyped-decorator]
        def accept_blobs(self, data: AcceptBlobs) -> None:
            """As the original, for a few layers of a few pictures."""
            index = data.data["index"]
            if index and str(index) != "null" and not 0 <= int(index) < _LAYERS:
                raise HTTPException(400, f"expected at most {_LAYERS} layers")
            super().accept_blobs(data)
            while len(self.blob_storage) > _HELD:
                del self.blob_storage[next(iter(self.blob_storage))]

    return Editor


def _opened(file: FileData | bytes) -> io.BytesIO | io.BufferedReader:
    return io.BytesIO(file) if isinstance(file, bytes) else open_regular(Path(file.path))
