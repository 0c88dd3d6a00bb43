"""What a model draws, on one image: many things in one language, or a few in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import generate
from flagai_altdiff.sheets import Row, make_sheet


def contact_sheet(
    model: LatentDiffusion, prompts: Sequence[str], *, columns: int, side: int = 96, seed: int = 1
) -> Image.Image:
    """An image for each prompt, row by row.

    Args:
        model: From ``load_model``.
        prompts: What to draw.
        columns: Images in a row.
        side: Height and width of an image on the sheet, in px.
        seed: Seed of the noise.
    """
    images = generate(model, list(prompts), batch_size=columns, seed=seed, seed_mode="batch").images
    rows = [Row(label="", images=images[first : first + columns]) for first in range(0, len(images), columns)]
    return make_sheet(rows, side)


def language_sheet(
    model: LatentDiffusion, prompts: Mapping[str, Sequence[str]], *, side: int = 64, seed: int = 1
) -> Image.Image:
    """A row for each language, a column for each thing.

    Args:
        model: From ``load_model``.
        prompts: Language -> prompts that mean the same in all of them.
        side: Height and width of an image on the sheet, in px.
        seed: Seed of the noise; each column starts from the same noise in every language.

    Returns:
        The sheet, with language codes at the left.
    """
    rows = []
    for language, own in prompts.items():
        images = generate(model, list(own), batch_size=len(own), seed=seed, seed_mode="batch").images
        rows.append(Row(label=language, images=images))
    return make_sheet(rows, side)
