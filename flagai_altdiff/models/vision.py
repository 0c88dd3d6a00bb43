"""CLIP's image tower: of the matching models, and of the released models' safety checker.

Attribute names are the keys of the released checkpoints (``vision_model.*``).

**Source**: Dosovitskiy et al. 2021 (arXiv 2010.11929) for ViT; Radford et al. 2021 (arXiv 2103.00020) for CLIP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flagai_altdiff.config import VisionConfig
from flagai_altdiff.models.layers import LazyEmbedding


class PatchEmbeddings(nn.Module):
    """Square patches as tokens behind a class token, with learnt positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = LazyEmbedding(config.num_patches + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, image_size, image_size) -> (B, 1 + patches, D)."""
        patches = rearrange(self.patch_embedding(pixel_values), "b d h w -> b (h w) d")
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Self-attention over all patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        projected = (f(x) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rearrange(y, "b l (h d) -> b h l d", h=self.heads) for y in projected)
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class VisionLayer(nn.Module):
    """One transformer layer (pre-norm)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.quick = config.hidden_act == "quick_gelu"
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, width)}
        )
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        return x + self.mlp["fc2"](hidden)


class VisionTower(nn.Module):
    """CLIP's image tower without its projection.

    Args:
        config: Sizes.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelled as in the files
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))}
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images.

        Args:
            pixel_values: (B, 3, image_size, image_size), as CLIP normalises them.

        Returns:
            Last hidden states (B, 1 + patches, D), and the normalised state of the class token (B, D).
        """
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = layer(x)
        return x, self.post_layernorm(x[:, 0])
