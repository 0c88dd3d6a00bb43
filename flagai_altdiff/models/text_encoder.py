"""XLM-RoBERTa with the read-outs of AltCLIP: the multilingual text encoder of every AltDiffusion model.

Attribute names are the keys of the released checkpoints (``cond_stage_model.*``).

**Source**: Conneau et al. 2020 (arXiv 1911.02116) for XLM-R; Chen et al. 2023 (arXiv 2211.06679) for AltCLIP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flagai_altdiff.config import TextEncoderConfig
from flagai_altdiff.models.layers import LazyEmbedding

PAD_ID = 1
"""Id of ``<pad>`` in every XLM-R vocabulary; position ids start behind it."""


def text_lengths(input_ids: Tensor) -> Tensor:
    """Tokens of each text up to its end, (B, L) -> (B,). A ``<pad>`` that a prompt spells out is one of them."""
    positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    return ((input_ids != PAD_ID) * positions).amax(dim=1)


def trim_padding(input_ids: Tensor) -> Tensor:
    """(B, L) -> (B, L'): without the padding behind the longest text, but for one row: all its rows are equal."""
    return input_ids[:, : int(text_lengths(input_ids).max()) + 1]


class Embeddings(nn.Module):
    """Sum of word, position and (single) token-type embeddings, normalised."""

    position_ids: Tensor

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = LazyEmbedding(config.vocab_size, config.hidden_size, padding_idx=PAD_ID)
        self.position_embeddings = LazyEmbedding(config.max_position_embeddings, config.hidden_size, padding_idx=PAD_ID)
        self.token_type_embeddings = LazyEmbedding(1, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # Part of the released files, never read: positions are counted from the tokens below.
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings, device="cpu")[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, hidden_size). Positions count tokens only; all padding shares one position."""
        is_token = (input_ids != PAD_ID).long()
        position_ids = torch.cumsum(is_token, dim=1) * is_token + PAD_ID
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.LayerNorm(x + self.position_embeddings(position_ids))


class SelfAttention(nn.Module):
    """Queries, keys and values of one layer."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D), boolean mask (B, 1, 1, L) of the keys that may be seen -> (B, L, D)."""
        q, k, v = (rearrange(f(x), "b l (h d) -> b h l d", h=self.heads) for f in (self.query, self.key, self.value))
        return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h l d -> b l (h d)")


class ResidualOutput(nn.Module):
    """Linear map back to the stream, added and normalised (post-norm)."""

    def __init__(self, dim_in: int, config: TextEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(dim_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """(B, L, dim_in), residual (B, L, D) -> (B, L, D)."""
        return self.LayerNorm(x + self.dense(y))


class Layer(nn.Module):
    """One transformer layer of XLM-R."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(config), "output": ResidualOutput(config.hidden_size, config)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D), (B, 1, 1, L) -> (B, L, D)."""
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Roberta(nn.Module):
    """Embeddings and layers of XLM-R.

    Args:
        config: Sizes.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        if config.has_pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(self, input_ids: Tensor, num_layers: int, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) -> hidden states behind the first ``num_layers`` layers, (B, L, D); nothing looks behind a text."""
        x = self.embeddings(input_ids)
        if attention_mask is None:
            attention_mask = torch.arange(input_ids.shape[1], device=x.device) < text_lengths(input_ids)[:, None]
        mask = attention_mask.bool()[:, None, None, :]
        for layer in self.encoder["layer"][:num_layers]:  # type: ignore[index]
            x = layer(x, mask)
        return x


class RobertaSeriesModelWithTransformation(nn.Module):
    """XLM-R and the projection to the UNet's context.

    AltDiffusion and -m9 project the last hidden state (``transformation``, without ``pre_LN``). -m18 normalises the
    state before the last layer (``pre_LN``) and projects that (``transformation_pre``). All other weights of the
    released files are kept so that they load and save whole; AltCLIP uses them.

    Args:
        config: Sizes and read-out.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.roberta = Roberta(config)
        self.transformation = nn.Linear(config.hidden_size, config.project_dim)
        self.pre_LN = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.has_pre_transformation:
            self.transformation_pre = nn.Linear(config.hidden_size, config.project_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Encode token ids.

        Args:
            input_ids: (B, L) int64, padded with ``PAD_ID``. Padding is never attended to, but has states of its own.

        Returns:
            (B, L, project_dim).
        """
        states = self._states(trim_padding(input_ids))
        repeats = input_ids.shape[1] - states.shape[1]
        return torch.cat([states, states[:, -1:].expand(-1, repeats, -1)], dim=1)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """AltCLIP's read-out, which compares texts with images.

        Args:
            input_ids: (B, L) int64, padded with ``PAD_ID``.
            attention_mask: (B, L), 0 where a text has ended; told from the padding if left out.

        Returns:
            Last hidden states (B, L, hidden_size), and the projection of the first, normalised (B, project_dim).
        """
        hidden = self.roberta(input_ids, self.config.num_hidden_layers, attention_mask)
        return hidden, self.transformation(self.pre_LN(hidden[:, 0]))

    def _states(self, input_ids: Tensor) -> Tensor:
        layers = self.config.num_hidden_layers
        if self.config.has_pre_transformation:
            return self.transformation_pre(self.pre_LN(self.roberta(input_ids, layers - 1)))
        return self.transformation(self.roberta(input_ids, layers))
