"""AltCLIP: a multilingual text tower and CLIP's image tower with features in one space.

Attribute names are the keys of the released checkpoints, FlagAI's and Hugging Face's alike.

**Source**: Chen et al. 2023 (arXiv 2211.06679).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.clip_images import ClipImageTransform, MatchingTransform
from flagai_altdiff.config import AltCLIPConfig
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation, trim_padding
from flagai_altdiff.models.vision import VisionTower
from flagai_altdiff.tokenizer import MAX_TOKENS, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flagai_altdiff.registry import ModelSpec


@dataclass(frozen=True)
class TowerOutput:
    """What a tower says of a batch.

    Args:
        last_hidden_state: (B, L, D) of the last layer.
        pooler_output: What the projection into the common space is given, (B, D').
    """

    last_hidden_state: Tensor
    pooler_output: Tensor

    def __getitem__(self, key: str | int) -> Tensor:
        """The same by name or place: FlagAI's towers give a mapping and a tuple."""
        values: Tensor = (
            getattr(self, key) if isinstance(key, str) else (self.last_hidden_state, self.pooler_output)[key]
        )
        return values


class MatchingOutput(TypedDict):
    """What :meth:`AltCLIP.forward` gives; N texts, M images, P the width of the common space."""

    loss: Tensor | None
    logits_per_image: Tensor
    logits_per_text: Tensor
    text_embeds: Tensor
    image_embeds: Tensor
    text_model_output: TowerOutput
    vision_model_output: TowerOutput
    logits: Tensor | None


class AltCLIP(nn.Module):
    """Texts and images -> features that match where they mean the same.

    Args:
        config: Sizes of both towers.

    Attributes:
        text_tokenizer: Turns texts into ids. It and the next two are set by the loader, outside the state dict.
        transform: Prepares images.
        spec: What the registry knows of the model; ``None`` if it was loaded by path.
        name: What to call it.
    """

    def __init__(self, config: AltCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = RobertaSeriesModelWithTransformation(config.text)
        self.vision_model = VisionTower(config.vision)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.project_dim, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.text_tokenizer: Tokenizer | None = None
        self.transform = MatchingTransform(transform=ClipImageTransform(size=config.vision.image_size))
        self.spec: ModelSpec | None = None
        self.name = ""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """A transformers tokenizer for scripts that call one, made when first asked for; matching does without."""
        return self.text_tokenizer.to_transformers() if self.text_tokenizer else None

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids, (B, L) int64, cut at 77 and padded to the longest, on the model's device.

        Not called ``tokenize``: FlagAI's zero-shot script takes a model with that for one of another kind.
        """
        assert self.text_tokenizer is not None, "load the model from its folder, which has a tokenizer"
        rows = self.text_tokenizer.ids(texts, MAX_TOKENS)
        return trim_padding(torch.tensor(rows, dtype=torch.long)).to(self.device)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> Tensor:
        """Features of texts, not normalised.

        Args:
            input_ids: (N, L) int64.
            attention_mask: (N, L), 0 where a text has ended; told from the padding if left out.
            unused: Whatever else a tokenizer gives.

        Returns:
            (N, P).
        """
        return self.text_projection(self.text_model.pooled(input_ids, attention_mask)[1])

    def get_image_features(self, pixel_values: Tensor, **unused: Any) -> Tensor:
        """Features of images, not normalised: (M, 3, size, size) as the transform gives them -> (M, P)."""
        return self.visual_projection(self.vision_model(pixel_values)[1])

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool = True,
        **unused: Any,
    ) -> MatchingOutput:
        """Compare every text with every image.

        Args:
            input_ids: (N, L) int64.
            pixel_values: (M, 3, size, size).
            attention_mask: As in :meth:`get_text_features`.
            return_loss: Whether to compute the contrastive loss, for which text k and image k belong together.
            unused: Whatever else a tokenizer or a batch has.

        Returns:
            Normalised features (``text_embeds``, ``image_embeds``), their scaled similarities (``logits_per_text``
            (N, M), ``logits_per_image`` (M, N)) and what the towers gave; for as many texts as images also the loss and
            the features of image and text side by side (``logits``), else ``None``.
        """
        hidden, pooled = self.text_model.pooled(input_ids, attention_mask)
        patches, seen = self.vision_model(pixel_values)
        text_embeds = F.normalize(self.text_projection(pooled), dim=-1)
        image_embeds = F.normalize(self.visual_projection(seen), dim=-1)
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.T
        paired = return_loss and len(text_embeds) == len(image_embeds)
        return {
            "loss": contrastive_loss(logits_per_text) if paired else None,
            "logits_per_image": logits_per_text.T,
            "logits_per_text": logits_per_text,
            "text_embeds": text_embeds,
            "image_embeds": image_embeds,
            "text_model_output": TowerOutput(hidden, pooled),
            "vision_model_output": TowerOutput(patches, seen),
            "logits": torch.cat([image_embeds, text_embeds], dim=-1) if paired else None,
        }

    def encode(self, texts: str | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """The states from which AltDiffusion draws, (N, 77, project_dim).

        Args:
            texts: A text or several.
            tokenizer: The model's, from ``AutoLoader.get_tokenizer()``.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(texts, **options)
        return self.text_model(tokens["input_ids"].to(self.device))


def contrastive_loss(logits_per_text: Tensor) -> Tensor:
    """CLIP's loss of a batch of pairs: cross entropy of finding one's partner, both ways. (B, B) -> ()."""
    partners = torch.arange(len(logits_per_text), device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, partners) + F.cross_entropy(logits_per_text.T, partners)) / 2
