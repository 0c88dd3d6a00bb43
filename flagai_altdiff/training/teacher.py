"""Teachers: CLIP models of transformers, whose text tower is learnt from, and the AltCLIP that a student begins as."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flagai_altdiff.checkpoint.altclip_folder import CONFIG
from flagai_altdiff.checkpoint.diffusers_folder import read_weights
from flagai_altdiff.checkpoint.json_config import load_json
from flagai_altdiff.config import AltCLIPConfig, TextEncoderConfig, VisionConfig
from flagai_altdiff.errors import CheckpointError, last_net
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.tokenizer import load_tokenizer, own_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MOST_TOKENS = 77
"""What CLIP reads of a text, start and end included."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A text tower of transformers: CLIP's, or another that says one thing of a whole text.

    Args:
        folder: Where it lies.
        model: The tower, or a whole CLIP model with image tower and projections.
        tokenizer: Its own.
    """

    folder: Path
    model: PreTrainedModel = field(repr=False)
    tokenizer: Callable[..., Any] = field(repr=False)

    @torch.no_grad()
    def teach(self, texts: list[str]) -> Tensor:
        """What its text tower says of texts at their end, before the projection, (B, D)."""
        tower: Any = getattr(self.model, "text_model", self.model)
        most = min(_MOST_TOKENS, getattr(tower.config, "max_position_embeddings", _MOST_TOKENS))
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=most, return_tensors="pt")
        found: Tensor = tower(**{name: value.to(tower.device) for name, value in tokens.items()}).pooler_output
        return found


def load_teacher(folder: Path) -> Teacher:
    """Load a text tower of this disk.

    Args:
        folder: A CLIP model, or another that has such a tower, in transformers' layout with its tokenizer.

    Raises:
        CheckpointError: There is none that transformers opens, or it lacks weights.
    """
    from transformers import AutoModel, AutoTokenizer

    with last_net(folder):
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG}; expected the folder of a CLIP model of transformers.")
        model, found = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):  # transformers draws them by chance, which teaches nothing
            raise CheckpointError(f"{folder} lacks {len(missing)} weights of its model, {missing[0]} for one.")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        teacher = Teacher(folder=folder, model=model.eval().requires_grad_(False), tokenizer=tokenizer)
        if not isinstance(teacher.teach(["a cat"]), Tensor):
            raise CheckpointError(f"{folder} has no text tower that says one thing of a whole text, as CLIP's does.")
    return teacher


def new_student(teacher: Teacher, encoder: Path, generator: torch.Generator) -> AltCLIP:
    """An AltCLIP that knows nothing yet: XLM-R with a fresh projection, beside the teacher's image tower.

    Args:
        teacher: A whole CLIP model.
        encoder: Folder of an XLM-R in transformers' layout, with its tokenizer.
        generator: Draws the fresh projection.

    Raises:
        CheckpointError: The teacher has no image tower, or ``encoder`` is no XLM-R.
        ConfigError: A config says something that cannot be built.
    """
    tower = {key: value.detach() for key, value in teacher.model.state_dict().items() if not key.endswith("_ids")}
    own = {key: value for key, value in tower.items() if not key.startswith("text_model.")}
    if "visual_projection.weight" not in own:
        raise CheckpointError(f"{teacher.folder} is no whole CLIP model: it has no image tower.")
    found = own_tokenizer(encoder)
    if found is None:
        raise CheckpointError(f"{encoder} has no tokenizer (sentencepiece.bpe.model or tokenizer.json).")
    found_weights = read_weights(encoder.parent, encoder.name)
    weights = {key.removeprefix("roberta."): value for key, value in found_weights.items()}
    roberta = {
        f"text_model.roberta.{key}": value
        for key, value in weights.items()
        if key.startswith(("embeddings.", "encoder.", "pooler.")) and not key.endswith("_ids")
    }
    width = tower["text_projection.weight"].shape[1]
    model = AltCLIP(
        AltCLIPConfig(
            text=_text_config(encoder, width, "text_model.roberta.pooler.dense.weight" in roberta),
            vision=_vision_config(teacher.model.config),
            projection_dim=own["visual_projection.weight"].shape[0],
        )
    )
    projection = model.text_model.transformation
    with torch.no_grad():
        drawn = torch.randn(projection.weight.shape, generator=generator)
        projection.weight.copy_(drawn * projection.weight.shape[1] ** -0.5)
        projection.bias.zero_()
    fresh = {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith(("text_model.transf", "text_model.pre"))
    }
    constants = {key: value for key, value in model.state_dict().items() if key.endswith("_ids")}
    try:
        model.load_state_dict({**own, **roberta, **fresh, **constants})
    except RuntimeError as error:
        raise CheckpointError(f"{encoder} and {teacher.folder} do not make an AltCLIP: {error}") from error
    model.text_tokenizer, model.name = load_tokenizer(found), encoder.name
    return model.eval()


def _text_config(folder: Path, project_dim: int, has_pooler: bool) -> TextEncoderConfig:
    file = load_json(folder / CONFIG)
    file.choice("model_type", {"xlm-roberta": "xlm-roberta"}, "")
    return TextEncoderConfig(
        hidden_size=file.integer("hidden_size", 768),
        num_hidden_layers=file.integer("num_hidden_layers", 12),
        num_attention_heads=file.integer("num_attention_heads", 12),
        intermediate_size=file.integer("intermediate_size", 3072),
        vocab_size=file.integer("vocab_size", 30522),
        max_position_embeddings=file.integer("max_position_embeddings", 512),
        layer_norm_eps=file.number("layer_norm_eps", 1e-12),
        project_dim=project_dim,
        has_pooler=has_pooler,
    )


def _vision_config(config: Any) -> VisionConfig:
    sizes = json.loads(json.dumps(config.vision_config.to_dict()))
    names = VisionConfig.__dataclass_fields__
    return VisionConfig(**{name: sizes[name] for name in names})
