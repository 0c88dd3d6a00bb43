"""The drawn scenes as training data: ``open_examples("drawn:")``, once this module is loaded."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.mini.captions import random_caption
from flagai_altdiff.mini.drawing import draw
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import training_scenes
from flagai_altdiff.training.data.example import Caption, Example, Layout, Tally
from flagai_altdiff.training.data.opening import OPENERS
from flagai_altdiff.training.data.source import Keys, Reading


class DrawnScenes:
    """Every scene that training may see, drawn several times, with a caption in each language.

    An example is the same whenever it is read; colours, sizes and places vary from drawing to drawing.

    Args:
        languages: Of the captions; all 18 unless given.
        drawings: Of each scene.
        side: Of the images, in px.
    """

    left_out = Tally()

    def __init__(self, languages: Sequence[str] = (), *, drawings: int = 1, side: int = 128) -> None:
        if unknown := [code for code in languages if code not in LANGUAGES]:
            raise InvalidRequestError("languages", unknown[0], f"expected some of {', '.join(LANGUAGES)}")
        if drawings < 1:
            raise InvalidRequestError("drawings", drawings, "expected 1 or more")
        self._languages, self._side = tuple(languages) or tuple(LANGUAGES), side
        self._scenes = training_scenes()
        self._count = len(self._scenes) * drawings

    @property
    def layout(self) -> Layout:
        """They lie no way in particular."""
        return Layout((self._count,))

    @property
    def keys(self) -> Sequence[str]:
        """The words of each scene, and which drawing of it."""
        return Keys(self._count, self._key)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        """Draw a scene."""
        if not 0 <= index < self._count:
            raise IndexError(f"example {index} of {self._count}")
        scene, chance = self._scenes[index % len(self._scenes)], random.Random(f"drawn:{index}")
        image = Image.fromarray(draw(scene, chance, side=self._side))
        captions = (Caption(random_caption(scene, code, chance), code) for code in self._languages)
        return Example(key=self._key(index), image=image, captions=tuple(captions))

    def _key(self, index: int) -> str:
        drawing, number = divmod(index, len(self._scenes))
        scene = self._scenes[number]
        return f"{scene.shape}-{scene.colour}-{scene.background}-{scene.size}-{scene.position}-{drawing}"


def open_drawn(what: str, how: Reading) -> DrawnScenes:
    """``drawn:``, ``drawn:de,en`` or ``drawn:de,en*5`` for five drawings of each scene.

    Args:
        what: What follows the colon.
        how: Its languages are used if ``what`` names none.
    """
    languages, star, drawings = what.partition("*")
    if star and not (drawings.isascii() and drawings.isdigit()):
        raise InvalidRequestError("drawn", what, "expected languages and a number of drawings, as in drawn:de,en*5")
    codes = tuple(code.strip() for code in languages.split(",") if code.strip()) or how.filters.languages
    return DrawnScenes(codes, drawings=int(drawings) if star else 1)


OPENERS["drawn"] = open_drawn
