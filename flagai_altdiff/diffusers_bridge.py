"""A model as a pipeline of diffusers, and back: the same weights in memory, not a copy of them.

Schedulers, ControlNet, IP-Adapter and whatever else is written for ``StableDiffusionPipeline`` then work with
AltDiffusion.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from flagai_altdiff import checkpoint
from flagai_altdiff.checkpoint.diffusers_folder import part_configs, read_config, read_weights, text_fields
from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers as diffusers_names
from flagai_altdiff.checkpoint.diffusers_keys import to_ldm
from flagai_altdiff.config import TextEncoderConfig
from flagai_altdiff.errors import CheckpointError, InvalidRequestError, MissingDependencyError
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation
from flagai_altdiff.registry import UNREGISTERED
from flagai_altdiff.tokenizer import load_tokenizer, own_tokenizer

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class TextConfig(PretrainedConfig):  # type: ignore[misc]
    """What a pipeline may ask of the text encoder."""

    model_type = "altdiffusion-text"


class MultilingualRobertaEncoder(PreTrainedModel):  # type: ignore[misc]
    """AltDiffusion's text encoder, as pipelines of diffusers call theirs: ``encoder(ids)[0]`` is (B, L, D).

    Padding is told from the ids, as in training; an attention mask changes nothing.

    Args:
        config: With the sizes of the tower.
        tower: The encoder itself; an empty one unless given.
    """

    config_class = TextConfig

    def __init__(self, config: PretrainedConfig, tower: RobertaSeriesModelWithTransformation | None = None) -> None:
        super().__init__(config)
        self.tower = tower or RobertaSeriesModelWithTransformation(_sizes(config))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False, **unused: Any
    ) -> tuple[Tensor]:
        """States of token ids, in a tuple.

        Raises:
            ValueError: States of other layers are asked for (``clip_skip``), which this encoder was not trained for.
        """
        if output_hidden_states:
            raise ValueError("clip_skip is for CLIP; leave it out: AltDiffusion's text encoder has one read-out")
        return (self.tower(input_ids),)

    def get_input_embeddings(self) -> Any:
        """The table of words."""
        return self.tower.roberta.embeddings.word_embeddings

    def save_pretrained(self, save_directory: str | Path, **unused: Any) -> None:
        """Write config and weights as a converted folder has them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        fields = {**_text_fields(self.tower.config), "architectures": [type(self).__name__]}
        (folder / _CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        checkpoint.saving.write_safetensors(folder / _WEIGHTS, self.tower.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, dtype: Any = None, **unused: Any) -> Any:
        """Read what :meth:`save_pretrained` or ``altdiff convert`` wrote."""
        folder = Path(folder)
        found = read_config(folder.parent)
        with torch.device("meta"):
            encoder = cls(_text_config(found.cond_stage))
        prefix = "cond_stage_model."
        state = to_ldm({"text_encoder": read_weights(folder.parent, folder.name)}, found)
        checkpoint.assign(encoder.tower, {key.removeprefix(prefix): value for key, value in state.items()}, str(folder))
        return encoder.to(dtype).eval() if isinstance(dtype, torch.dtype) else encoder.eval()


MultilingualRobertaEncoder.__module__ = "flagai_altdiff"  # where diffusers looks for it when it opens a folder


def to_diffusers(model: LatentDiffusion, kind: Any = None, **parts: Any) -> Any:
    """A pipeline that shares the model's weights.

    Args:
        model: From ``load_model``.
        kind: Class of the pipeline; ``StableDiffusionPipeline`` unless given.
        parts: Further parts for it, a ControlNet or a scheduler for example.

    Raises:
        MissingDependencyError: diffusers is not installed.
        ConfigError: diffusers' classes cannot express the model.
        InvalidRequestError: It is no model.
    """
    if not isinstance(model, LatentDiffusion):
        raise InvalidRequestError("model", type(model).__name__, "a model, from load_model for example")
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependencyError("to_diffusers needs diffusers: pip install diffusers") from error
    fields = part_configs(model.config)
    state = diffusers_names(model.state_dict(), model.config)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(fields["unet/config.json"])  # type: ignore[no-untyped-call]
        vae = diffusers.AutoencoderKL.from_config(fields["vae/config.json"])  # type: ignore[no-untyped-call]
    unet.load_state_dict(state["unet"], assign=True)
    vae.load_state_dict(state["vae"], assign=True)
    with torch.device("meta"):  # a module of its own: pipelines move theirs, and change its precision
        tower = RobertaSeriesModelWithTransformation(model.config.cond_stage)
    tower.load_state_dict(model.cond_stage_model.state_dict(), assign=True)
    encoder = MultilingualRobertaEncoder(_text_config(model.config.cond_stage), tower)
    scheduler = diffusers.DDIMScheduler.from_config(fields["scheduler/scheduler_config.json"])  # type: ignore[no-untyped-call]
    made = {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": encoder.eval(),
        "tokenizer": model.tokenizer,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **parts,
    }
    pipeline: Any = (kind or diffusers.StableDiffusionPipeline)(**made)
    for module in (unet, vae, pipeline.text_encoder):
        module.requires_grad_(False)
    return pipeline


def from_diffusers(pipeline: Any) -> LatentDiffusion:
    """The model in a pipeline of diffusers; it shares the pipeline's weights where they are float32 on the CPU.

    Args:
        pipeline: From :func:`to_diffusers`, or opened from a folder that ``altdiff convert`` wrote.

    Raises:
        CheckpointError: Its text encoder is not AltDiffusion's.
        ConfigError: Its parts say something that AltDiffusion's cannot express.
    """
    encoder = getattr(pipeline, "text_encoder", None)
    if not isinstance(encoder, MultilingualRobertaEncoder):
        raise CheckpointError(f"the pipeline's text encoder is {type(encoder).__name__}, not AltDiffusion's.")
    if any(".lora_A." in name for name, _ in pipeline.unet.named_parameters()):
        raise CheckpointError("the pipeline has a LoRA beside its weights; fuse_lora() or unload_lora_weights() first.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, part in (("unet", pipeline.unet), ("vae", pipeline.vae), ("scheduler", pipeline.scheduler)):
            part.save_config(folder / name)
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder" / _CONFIG).write_text(json.dumps(_text_fields(encoder.tower.config)), encoding="utf-8")
        (folder / "model_index.json").write_text(json.dumps(_INDEX), encoding="utf-8")
        config = read_config(folder)
        tokenizer = None
        if pipeline.tokenizer is not None:
            pipeline.tokenizer.save_pretrained(folder / "tokenizer")
            tokenizer = load_tokenizer(own_tokenizer(folder / "tokenizer") or folder / "tokenizer" / "tokenizer.json")
    parts = {"unet": pipeline.unet.state_dict(), "vae": pipeline.vae.state_dict()}
    state = to_ldm(parts, config)
    state |= {f"cond_stage_model.{key}": value for key, value in encoder.tower.state_dict().items()}
    with torch.device("meta"):
        model = build_model(config)
    checkpoint.assign(model, state, "the pipeline", mapped=True)
    model.text_tokenizer, model.spec = tokenizer, UNREGISTERED
    return model.eval()


_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["flagai_altdiff", "MultilingualRobertaEncoder"],
}


def _text_fields(config: TextEncoderConfig) -> dict[str, Any]:
    return dict(text_fields(config))


def _text_config(config: TextEncoderConfig) -> TextConfig:
    return TextConfig(**{**_text_fields(config), "model_type": TextConfig.model_type})


def _sizes(config: PretrainedConfig) -> TextEncoderConfig:
    names = TextEncoderConfig.__dataclass_fields__
    return TextEncoderConfig(**{name: getattr(config, name) for name in names if hasattr(config, name)})
