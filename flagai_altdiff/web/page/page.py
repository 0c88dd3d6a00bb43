"""The page as Gradio builds it: what stands where, and what happens when something is pressed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from flagai_altdiff.errors import FlagAIAltDiffError
from flagai_altdiff.pictures import Picture
from flagai_altdiff.registry import UNREGISTERED, find_model
from flagai_altdiff.request import MAX_SEED
from flagai_altdiff.web.history import History
from flagai_altdiff.web.jobs import Job
from flagai_altdiff.web.page.editor import picture_editor
from flagai_altdiff.web.page.languages import EXAMPLES
from flagai_altdiff.web.page.shown import (
    caption,
    error_html,
    image_of,
    interrupted_html,
    is_file,
    long_html,
    loras_of,
    status_html,
)
from flagai_altdiff.web.page.texts import LANGUAGES, language_of, option_help, option_label, said
from flagai_altdiff.web.page.tokens import tokens_html, unknown_html
from flagai_altdiff.web.page.widgets import BESIDE_PICTURE, FIRST, MORE, SHOWN, given, widget
from flagai_altdiff.web.service import BusyError, Service

_NEAR = 0.25
_STRONGEST = 2.0
"""Of a LoRA; a request may ask for more."""
_OF_MODEL = ("steps", "width", "height", "guidance_scale")
_PER_PAGE = 24
_LONGEST = 20_000
_HERE = Path(__file__).parent
STYLE, SCRIPT = _HERE / "page.css", _HERE / "page.js"


def make_page(service: Service, history: History) -> gr.Blocks:
    """The page of a server.

    Args:
        service: Draws.
        history: What was drawn before.
    """
    return _Page(service, history).blocks


class _Page:
    def __init__(self, service: Service, history: History) -> None:
        self._service, self._history = service, history
        self._sessions: dict[str, Job] = {}
        self._options: dict[str, Any] = {}
        with gr.Blocks(title="AltDiffusion", analytics_enabled=False, fill_width=True) as self.blocks:
            self._lay_out()
            self._connect()

    def _lay_out(self) -> None:
        """All widgets, speaking English until it is known who reads."""
        names = list(self._service.settings.drawing.names)
        with gr.Row(elem_id="head"):
            gr.HTML("<h1>AltDiffusion</h1>", padding=False)
            self._language = gr.Radio(
                [(title, code) for code, title in LANGUAGES.items()],
                value="en",
                label="Language · 语言",
                elem_id="language",
            )
        self._shown, self._chosen, self._oldest = gr.State([]), gr.State(None), gr.State(None)
        with gr.Row(elem_id="desk"):  # page.css says what stands where
            with gr.Column(elem_id="asked"):
                self._prompt = gr.Textbox(
                    label=said("prompt", "en"),
                    info=said("prompt_help", "en"),
                    lines=3,
                    elem_id="prompt",
                    max_length=20_000,
                )
                self._tokens = gr.HTML(elem_id="tokens", padding=False)
                with gr.Row():
                    self._draw = gr.Button(said("draw", "en"), variant="primary", elem_id="draw")
                    self._cancel = gr.Button(said("cancel", "en"), elem_id="cancel")
            with gr.Column(elem_id="set"):
                with gr.Accordion(said("examples", "en"), open=True, elem_id="examples") as self._examples_part:
                    self._examples = gr.Dataset(
                        components=[gr.Textbox(visible=False)],
                        samples=[[text] for text in EXAMPLES.values()],
                        sample_labels=[f"{name}: {text}" for name, text in EXAMPLES.items()],
                        samples_per_page=len(EXAMPLES),
                        show_label=False,
                    )
                self._model = gr.Dropdown(
                    names,
                    value=names[0],
                    label=said("model", "en"),
                    info=said("model_help", "en"),
                    visible=len(names) > 1,
                )
                self._loras = gr.Dropdown(
                    list(self._service.loras),
                    multiselect=True,
                    label=said("lora", "en"),
                    info=said("lora_help", "en"),
                    visible=bool(self._service.loras),
                    elem_id="loras",
                )
                self._strengths = {
                    name: gr.Slider(
                        -_STRONGEST,
                        _STRONGEST,
                        value=1.0,
                        step=0.05,
                        label=name,
                        info=said("lora_strength", "en"),
                        visible=False,
                        elem_id=f"lora-{number}",
                    )
                    for number, name in enumerate(self._service.loras)
                }
                with gr.Row():
                    self._add(FIRST)
                with gr.Accordion(said("picture", "en"), open=False, elem_id="picture") as self._picture_part:
                    self._picture = picture_editor(self._service.settings.limits.picture_pixels)(
                        type="pil",
                        label=said("picture", "en"),
                        elem_id="editor",
                        brush=gr.Brush(default_size=24, colors=["#ffffff"], color_mode="fixed"),
                        layers=False,
                        sources=["upload", "clipboard"],
                        transforms=(),
                    )
                    self._picture_help = gr.Markdown(said("picture_help", "en"))
                    with gr.Row():
                        self._add(BESIDE_PICTURE)
                with gr.Accordion(said("more", "en"), open=False, elem_id="more") as self._more_part, gr.Row():
                    self._add(MORE)
            with gr.Column(elem_id="drawn"):
                self._status = gr.HTML(status_html(None, 0, "en"), elem_id="status", padding=False)
                self._gallery = _gallery("images", 2)
                self._viewer = gr.HTML(elem_id="viewer", padding=False)
                with gr.Row():
                    self._again = gr.Button(said("again", "en"), elem_id="again")
                    self._near = gr.Button(said("near", "en"), elem_id="near")
                    self._edit = gr.Button(said("edit", "en"), elem_id="edit")
                with gr.Accordion(said("history", "en"), open=True, elem_id="history-part") as self._history_part:
                    self._past = _gallery("history", 4)
                    self._older = gr.Button(said("older", "en"), elem_id="older")
                    self._lost = gr.HTML(elem_id="interrupted", padding=False)
        self._past_shown = gr.State([])

    def _add(self, names: Sequence[str]) -> None:
        spec = find_model(self._service.default_model) or UNREGISTERED
        for name in names:
            self._options[name] = widget(SHOWN[name], "en", spec)

    def _connect(self) -> None:
        """What happens when something is pressed."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        at_once: dict[str, Any] = {"queue": False, **quiet}
        options, strengths = list(self._options.values()), list(self._strengths.values())
        drawing: dict[str, Any] = {
            "fn": self._draw_it,
            "inputs": [self._language, self._prompt, self._model, self._loras, self._picture, *strengths, *options],
            "outputs": [self._status, self._gallery, self._viewer, self._shown, self._chosen],
            "concurrency_limit": None,
            **quiet,
        }
        past: dict[str, Any] = {"outputs": [self._past, self._past_shown, self._oldest], **at_once}
        newest = {"fn": lambda language: self._page_of(language, None, []), "inputs": [self._language], **past}
        for trigger in (self._draw.click, self._prompt.submit):
            trigger(**drawing).then(**newest)
        self._cancel.click(self._cancel_it, **at_once)
        self._examples.click(lambda sample: sample[0], self._examples, self._prompt, **at_once)
        reading = [self._language, self._prompt, self._model, self._options["prompt_syntax"]]
        for changed in (self._prompt, self._options["prompt_syntax"]):
            changed.change(self._read, reading, self._tokens, trigger_mode="always_last", **at_once)
        self._gallery.select(self._choose, self._shown, self._chosen, **at_once)
        self._past.select(self._choose, self._past_shown, self._chosen, **at_once)
        for button, change in ((self._again, None), (self._near, _NEAR)):
            filled = button.click(
                lambda chosen, language, change=change: self._filled(chosen, language, change),
                [self._chosen, self._language],
                [self._status, self._prompt, self._loras, *strengths, *options],
                **at_once,
            )
            filled.success(**drawing).then(**newest)
        if strengths:
            self._loras.change(self._chosen_strengths, self._loras, strengths, **at_once)
        self._edit.click(self._to_editor, self._chosen, [self._picture, self._picture_part], **at_once)
        self._older.click(self._page_of, [self._language, self._oldest, self._past_shown], **past)
        spoken = [component for component, _ in self._spoken]
        self._language.change(self._speak, self._language, spoken, **at_once)
        own = [self._options[name] for name in _OF_MODEL]
        self._model.change(self._defaults, self._model, own, **at_once)
        self.blocks.load(self._greet, None, [self._language, *spoken], **at_once).then(**newest)
        if find_model(self._service.default_model) is None:  # whose numbers are known once its files are read
            self.blocks.load(self._defaults, self._model, own, **at_once)
        self.blocks.load(self._interrupted, self._language, self._lost, **at_once)
        self._language.change(self._interrupted, self._language, self._lost, **at_once)
        self.blocks.unload(self._leave)

    @cached_property
    def _spoken(self) -> list[tuple[Any, Any]]:
        """Widgets with what they say in a language."""

        def labelled(key: str, *more: str) -> Any:
            names = ("label", *more)
            keys = (key, f"{key}_help")
            return lambda language: {name: said(k, language) for name, k in zip(names, keys, strict=False)}

        def valued(key: str, place: str = "value") -> Any:
            return lambda language: {place: said(key, language)}

        def optional(name: str) -> Any:
            return lambda language: {"label": option_label(name, language), "info": option_help(name, language)}

        fixed = [
            (self._prompt, labelled("prompt", "info")),
            (self._examples_part, labelled("examples")),
            (self._draw, valued("draw")),
            (self._cancel, valued("cancel")),
            (self._model, labelled("model", "info")),
            (self._loras, labelled("lora", "info")),
            (self._picture, labelled("picture")),
            (self._picture_part, labelled("picture")),
            (self._picture_help, valued("picture_help")),
            (self._more_part, labelled("more")),
            (self._gallery, labelled("images")),
            (self._again, valued("again")),
            (self._near, valued("near")),
            (self._edit, valued("edit")),
            (self._history_part, labelled("history")),
            (self._past, labelled("history")),
            (self._older, valued("older")),
            (self._status, lambda language: {"value": status_html(None, 0, language)}),
        ]
        strengths = [(slider, valued("lora_strength", "info")) for slider in self._strengths.values()]
        return [*fixed, *strengths, *((component, optional(name)) for name, component in self._options.items())]

    def _speak(self, language: str) -> list[Any]:
        return [gr.update(**words(language)) for _, words in self._spoken]

    def _greet(self, request: gr.Request) -> list[Any]:
        language = language_of(request.headers.get("accept-language", ""))
        if language == "en":  # as it was sent: nothing is changed under the hands of those who type already
            return [gr.skip()] * (1 + len(self._spoken))
        return [language, *self._speak(language)]

    async def _defaults(self, model: str) -> list[Any]:
        """What a model draws unless told otherwise."""
        await self._service.ready()
        card = self._service.card(model)
        return [getattr(card, name) for name in _OF_MODEL]

    async def _draw_it(
        self,
        request: gr.Request,
        language: str,
        prompt: str,
        model: str,
        loras: Sequence[str],
        edited: Mapping[str, Any] | None,
        *values: Any,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Draw what the widgets say, and show it while it becomes."""
        unchanged = (gr.skip(), gr.skip(), gr.skip(), gr.skip())
        if not prompt.strip() and not edited:
            yield (error_html(said("empty", language)), *unchanged)
            return
        strengths = dict(zip(self._strengths, values, strict=False))
        options = given(dict(zip(self._options, values[len(strengths) :], strict=True)))
        session = str(request.session_hash)
        try:
            job = await self._service.submit(
                {"prompts": prompt, **options, **_picture_options(edited, options)},
                client=f"page {session}",
                model=model,
                loras=[(name, strengths.get(name, 1.0)) for name in loras or ()],
            )
        except (FlagAIAltDiffError, BusyError) as error:
            yield (error_html(str(error)), *unchanged)
            return
        self._sessions[session] = job
        try:
            shown = 0
            async for _ in job.watch():
                status = status_html(job, self._service.position(job), language)
                if len(job.images) == shown and not job.is_over:
                    yield (status, *unchanged)
                    continue
                shown = len(job.images)
                records = _records(job)
                images = [
                    (image_of(image), caption(record, language))
                    for image, record in zip(job.images, records, strict=True)
                    if image.png is not None or is_file(image.path)
                ]
                yield status, images, long_html(job, language), records, records[0] if records else None
        finally:
            self._service.cancel(job, "the page was closed")
            if self._sessions.get(session) is job:
                del self._sessions[session]

    def _cancel_it(self, request: gr.Request) -> None:
        job = self._sessions.get(str(request.session_hash))
        if job is not None:
            self._service.cancel(job)

    def _leave(self, request: gr.Request) -> None:
        self._cancel_it(request)

    def _interrupted(self, language: str) -> str:
        """What an earlier server accepted and did not draw."""
        lost = [own for own in self._service.earlier.values() if own["state"] == "interrupted"]
        return interrupted_html(lost, language)

    def _choose(self, records: Sequence[Any], event: gr.SelectData) -> Any:
        return records[event.index] if records and event.index < len(records) else None

    def _filled(self, chosen: Mapping[str, Any] | None, language: str, variation: float | None) -> list[Any]:
        """The widgets as an image was drawn, or near it."""
        if chosen is None:
            raise gr.Error(said("choose", language), print_exception=False)
        values = {name: chosen.get(name, option.default) for name, option in SHOWN.items()}
        values = {name: "" if value is None else value for name, value in values.items()}
        index = chosen.get("index") or 0
        if index and (values["seed_mode"] == "batch" or values["fixed_code"]):
            raise gr.Error(said("of_a_batch", language), print_exception=False)
        values |= {"images_per_prompt": 1, "iterations": 1}
        if values["variation_strength"]:
            values["variation_seed"] = (values["variation_seed"] + index) % (MAX_SEED + 1)
        if variation is not None:
            values |= {"variation_strength": variation, "variation_seed": -1, "seed_mode": "per_image"}
            values["images_per_prompt"] = 4
        own = {name: strength for name, strength in loras_of(chosen).items() if name in self._strengths}
        strengths = [own.get(name, 1.0) for name in self._strengths]
        return [gr.skip(), chosen.get("prompt", ""), list(own), *strengths, *(values[name] for name in self._options)]

    def _chosen_strengths(self, chosen: Sequence[str] | None) -> Any:
        """A slider for each LoRA that is chosen."""
        shown = [gr.update(visible=name in (chosen or ())) for name in self._strengths]
        return shown if len(shown) != 1 else shown[0]

    def _to_editor(self, chosen: Mapping[str, Any] | None) -> tuple[Any, Any]:
        if chosen is None or not is_file(Path(chosen.get("file") or "/")):
            return gr.skip(), gr.skip()
        return {"background": chosen["file"], "layers": [], "composite": chosen["file"]}, gr.update(open=True)

    def _page_of(self, language: str, before: int | None, shown: Sequence[Any]) -> tuple[Any, ...]:
        """Some more of the history, behind what is shown."""
        found = self._history.page(before, _PER_PAGE)
        records = [*(shown if before else ()), *({**record, "file": str(path)} for _, path, record in found)]
        images = [(record["file"], caption(record, language)) for record in records if is_file(Path(record["file"]))]
        return images, records, found[-1][0] if found else before

    def _read(self, language: str, prompt: str, model: str, syntax: str) -> str:
        seen = tokens_html(self._service.reader.tokenizer(model), prompt, syntax, language)
        spec = find_model(model)
        return seen + unknown_html(spec.name, prompt, language) if spec and spec.embedded else seen


def _gallery(key: str, columns: int) -> gr.Gallery:
    return gr.Gallery(label=said(key, "en"), elem_id=key, columns=columns, height="auto", object_fit="contain")


def _records(job: Job) -> list[dict[str, Any]]:
    """What is known of the images of a job, as the records of files say it."""
    own = {name: value for name, value in job.task.request.as_json().items() if name in SHOWN}
    return [
        {
            **own,
            "prompt": image.prompt,
            "seed": image.seed,
            "index": image.index,
            "model": job.task.model,
            "loras": [{"name": name, "strength": strength} for name, strength in job.task.loras],
            "file": str(image.path) if image.path else None,
        }
        for image in job.images
    ]


def _picture_options(edited: Mapping[str, Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The picture of the editor, and what was painted over it as the mask."""
    background = edited.get("background") if edited else None
    if edited is None or background is None:
        return {}
    found: dict[str, Any] = {"init_image": Picture(background.convert("RGB"))}
    painted = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in edited.get("layers") or ()]
    if painted and np.any(painted):
        mask = Image.fromarray(np.any(painted, axis=0).astype(np.uint8) * 255)
        found["mask_image"] = Picture(mask.resize(background.size, Image.Resampling.NEAREST).convert("RGB"))
        if "strength" not in options:
            found["strength"] = 1.0
    return found
