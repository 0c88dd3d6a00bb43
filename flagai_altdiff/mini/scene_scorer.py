"""The judge as a scorer of evaluations: whether an image shows the scene that its prompt describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from flagai_altdiff.checkpoint.weights import fingerprint
from flagai_altdiff.evaluation.tables import Prompt
from flagai_altdiff.mini.batches import as_batch
from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.judge import load_judge, see
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene, all_scenes

_SIDE = 128
_JUDGED = 3
"""Shape, colour and background; what a prompt does not say of size and position may be anything."""


class SceneScorer:
    """Says of each image whether shape, colour and background are those of its prompt.

    Args:
        prompts: Language -> prompts.

    Attributes:
        known: How many of the prompts are captions of the drawn world; of the others nothing can be said.
    """

    def __init__(self, prompts: Mapping[str, Sequence[Prompt]]) -> None:
        self._scenes: dict[str, Scene] = {}
        for language, own in prompts.items():
            if language in LANGUAGES:
                scenes = _scenes(language)
                texts = {prompt.text for prompt in own}
                self._scenes |= {text: scenes[_plain(text)] for text in texts if _plain(text) in scenes}
        self.known = sum(prompt.text in self._scenes for own in prompts.values() for prompt in own)
        self.key = f"scenes {fingerprint(load_judge())}"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """``accuracy``: 1 for what is right, 0 for what is not, NaN for prompts that are no captions."""
        small = [image if image.size == (_SIDE, _SIDE) else image.resize((_SIDE, _SIDE)) for image in images]
        right = []
        for seen, prompt in zip(see(load_judge(), as_batch(small)), prompts, strict=True):
            scene = self._scenes.get(prompt.text)
            right.append(float(seen.labels[:_JUDGED] == scene.labels[:_JUDGED]) if scene else float("nan"))
        return {"accuracy": torch.tensor(right)}


def _scenes(language: str) -> dict[str, Scene]:
    """Every caption of a language -> its scene; no two scenes share one."""
    patterns = range(len(LANGUAGES[language].patterns))
    return {_plain(caption(scene, language, pattern=i)): scene for scene in all_scenes() for i in patterns}


def _plain(text: str) -> str:
    return text.strip().rstrip(".。।").casefold()
