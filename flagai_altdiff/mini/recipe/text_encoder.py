"""Captions as training data, and the training of the text encoder from the captions' own labels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.config import TextEncoderConfig
from flagai_altdiff.mini.captions import random_caption
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import ATTRIBUTES, Scene
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation, trim_padding
from flagai_altdiff.tokenizer import load_tokenizer
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.objectives import Batch

UNNAMED = -100
WITHOUT_BACKGROUND = 0.15
WITH_STRANGE_WORD = 0.15
STRANGE_LETTERS = "abcdefghijklmnoprstuvwyz", "абвгдежзиклмнопрсту", "أبتجدرسعفقكلمنهوي", "कखगचजतदनपबमयरलसह"


class CaptionTokenizer:
    """The model's tokenizer, before there is a model.

    Args:
        path: ``sentencepiece.bpe.model``.
    """

    def __init__(self, path: Path) -> None:
        self._tokenizer = load_tokenizer(path)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._tokenizer)

    def __call__(self, texts: list[str]) -> Tensor:
        """Ids of texts, (B, 77) int64."""
        return torch.tensor(self._tokenizer.ids(texts))


def draw_caption(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """A caption in a random language, and whether it names the background.

    Some have a word in them that means nothing, so that strange words do no harm later.
    """
    named = rng.random() >= WITHOUT_BACKGROUND
    text = random_caption(scene, rng.choice(list(LANGUAGES)), rng, with_background=named)
    if rng.random() < WITH_STRANGE_WORD:
        words = text.split(" ")
        letters = rng.choice(STRANGE_LETTERS)
        words.insert(rng.randint(0, len(words)), "".join(rng.choices(letters, k=rng.randint(1, 7))))
        text = " ".join(words)
    return text, named


class TextWithHeads(nn.Module):
    """The text encoder and the linear read-outs that teach it; the read-outs are thrown away.

    Args:
        config: Sizes of the text encoder.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.encoder = RobertaSeriesModelWithTransformation(config)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.project_dim, len(classes)) for name, classes in ATTRIBUTES.items()}
        )

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """(B, L) -> for each attribute the logits of every token, (B, L, classes)."""
        states = self.encoder(input_ids)
        return {name: head(states) for name, head in self.heads.items()}


def text_task(
    model: TextWithHeads, tokenizer: CaptionTokenizer, settings: StageSettings, scenes: Sequence[Scene]
) -> Task:
    """Every token of a caption, in any language, must tell the whole scene."""
    background = list(ATTRIBUTES).index("background")

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"text:{step}")
        drawn = rng.choices(scenes, k=settings.row.batch_size)
        captions = [draw_caption(scene, rng) for scene in drawn]
        labels, weights = torch.tensor([scene.labels for scene in drawn]), torch.ones(len(drawn), len(ATTRIBUTES))
        named = torch.tensor([named for _, named in captions])
        labels[~named, background] = UNNAMED
        weights[:, background] = len(drawn) / named.sum().clamp(min=1)  # the mean is over those that name one
        ids = trim_padding(tokenizer([text for text, _ in captions]))  # one padding row stays, which tells all as well
        return {"ids": ids, "labels": labels, "weights": weights}

    def losses(batch: Batch) -> Tensor:
        found = []
        for logits, wanted in zip(model(batch["ids"]).values(), batch["labels"].T, strict=True):
            everywhere = wanted[:, None].expand(logits.shape[:2])
            each = F.cross_entropy(logits.flatten(0, 1), everywhere.flatten(), ignore_index=UNNAMED, reduction="none")
            found.append(each.view(logits.shape[:2]).mean(dim=1))
        return (torch.stack(found, dim=1) * batch["weights"]).sum(dim=1)

    return Task(model=model, draw=draw, losses=losses)


@torch.no_grad()
def normalise_states(encoder: RobertaSeriesModelWithTransformation, input_ids: Tensor) -> None:
    """Give each of the text states' dimensions mean 0 and variance 1, by folding an affine map into ``transformation``.

    Args:
        encoder: Changed in place.
        input_ids: (B, L) captions that the statistics are taken over, padding included once.
    """
    states = encoder(trim_padding(input_ids)).flatten(0, 1)
    mean, std = states.mean(dim=0), states.std(dim=0)
    layer = encoder.transformation
    layer.weight /= std[:, None]
    layer.bias.copy_((layer.bias - mean) / std)
