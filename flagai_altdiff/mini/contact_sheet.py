"""One image of what a model draws in all languages."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import generate
from flagai_altdiff.sheets import Row, make_sheet


def contact_sheet(model: LatentDiffusion, scenes: Sequence[Scene], *, side: int = 64, seed: int = 1) -> Image.Image:
    """A row for each language, a column for each scene.

    Args:
        model: From ``load_model``.
        scenes: What to draw; every language describes the same ones.
        side: Height and width of an image on the sheet, in px.
        seed: Seed of the noise; each column starts from the same noise in every language.

    Returns:
        The sheet, with language codes at the left.
    """
    rows = []
    for language in LANGUAGES:
        prompts = [caption(scene, language) for scene in scenes]
        result = generate(model, prompts, batch_size=len(prompts), seed=seed, seed_mode="batch")
        rows.append(Row(label=language, images=result.images))
    return make_sheet(rows, side)
