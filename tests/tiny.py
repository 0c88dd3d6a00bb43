"""Checkpoints of the released kinds at tiny size: the same files, names and keys, random weights of order one.

The two variants have the shapes of AltDiffusion / AltDiffusion-m9 (eight heads, convolutional projections, last hidden
state) and of AltDiffusion-m18 (heads of 64, linear projections, hidden state before the last layer).
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flagai_altdiff.checkpoint.ldm_yaml import parse_config
from flagai_altdiff.config import AltCLIPConfig, LatentDiffusionConfig, TextEncoderConfig, VisionConfig
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.altclip import AltCLIP

CAT = "a photo of a cat sitting on a red chair"
CASTLE = "a castle on a hill at sunset"
SENTENCES = (
    CAT,
    CASTLE,
    "lowres, bad anatomy, bad hands, text, error, cropped, worst quality, low quality, blurry, "
    "jpeg artifacts, watermark",
    "a large red heart on a white background, a small blue star above a green house",
    "the quick brown fox jumps over the lazy dog while 0123456789 birds fly; who would have thought?",
    "一只戴着帽子的小狗坐在草地上，蓝色背景上的黄色的大星星",
    "بيت أبيض كبير على خلفية خضراء",
    "большой фиолетовый цветок на жёлтом фоне",
    "赤い椅子に座っている猫の写真",
    "잔디 위에 앉아 있는 모자를 쓴 강아지",
    "un château sur une colline, une grande étoile bleue et un cœur rouge",
)


@dataclass(frozen=True)
class Variant:
    """One released shape: the target strings of its config.yaml, and the parameters that differ."""

    model: str
    unet: str
    first_stage: str
    cond_stage: str
    unet_params: dict[str, Any]


M9 = Variant(
    model="flagai.model.mm.AltDiffusion.LatentDiffusion",
    unet="flagai.model.mm.Unets.Unet.UNetModel",
    first_stage="flagai.model.mm.autoencoders.AutoencoderKL",
    cond_stage="flagai.model.mm.modeling_berts.RobertaSeriesModelWithTransformation",
    unet_params={"model_channels": 32, "num_heads": 8, "context_dim": 64},
)
M18 = Variant(
    model="flagai.model.mm.AltDiffusionM18.LatentDiffusion",
    unet="flagai.model.mm.modules.diffusionmodules.openaimodel.UNetModel",
    first_stage="flagai.model.mm.autoencoder_m18.AutoencoderKL",
    cond_stage="flagai.model.mm.modeling_berts_m18.RobertaSeriesModelWithTransformation",
    unet_params={
        "model_channels": 64,
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "context_dim": 128,
        "use_fp16": True,
    },
)
VARIANTS = {"m9": M9, "m18": M18}


def config_data(variant: Variant, **model_params: Any) -> dict[str, Any]:
    """The data of a config.yaml as FlagAI ships it: nothing in it about the text encoder's sizes."""
    return {
        "model": {
            "base_learning_rate": 1.0e-04,
            "target": variant.model,
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.0120,
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "timesteps": 1000,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": 64,
                "channels": 4,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "monitor": "val/loss_simple_ema",
                "scale_factor": 0.18215,
                "use_ema": False,
                "unet_config": {
                    "target": variant.unet,
                    "params": {
                        "image_size": 32,
                        "in_channels": 4,
                        "out_channels": 4,
                        "attention_resolutions": [1],
                        "num_res_blocks": 1,
                        "channel_mult": [1, 2],
                        "use_spatial_transformer": True,
                        "transformer_depth": 1,
                        "use_checkpoint": True,
                        "legacy": False,
                        **variant.unet_params,
                    },
                },
                "first_stage_config": {
                    "target": variant.first_stage,
                    "params": {
                        "embed_dim": 4,
                        "monitor": "val/rec_loss",
                        "ddconfig": {
                            "double_z": True,
                            "z_channels": 4,
                            "resolution": 256,
                            "in_channels": 3,
                            "out_ch": 3,
                            "ch": 32,
                            "ch_mult": [1, 2, 1, 1],
                            "num_res_blocks": 1,
                            "attn_resolutions": [],
                            "dropout": 0.0,
                        },
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": {"target": variant.cond_stage, "params": {}},
                **model_params,
            },
        }
    }


def tiny_config(variant: Variant, **changes: Any) -> LatentDiffusionConfig:
    """The complete config of a tiny model: config.yaml's, with the sizes that only the weights know."""
    config = parse_config(config_data(variant))
    pre = config.cond_stage.has_pre_transformation
    text = TextEncoderConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        vocab_size=vocabulary_size(),
        project_dim=config.unet.context_dim,
        has_pre_transformation=pre,
        has_pooler=not pre,
    )
    return replace(config, cond_stage=text, **changes)


def fill(state: dict[str, Tensor], seed: int) -> None:
    """Random weights with which every layer gives numbers of order one, so that nothing in the wrong place can hide."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in state.items():
        if not value.is_floating_point() or "." not in key:
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 1:
            value.copy_(0.1 * noise if key.endswith("bias") else 1 + 0.1 * noise)
        else:
            value.copy_(noise if "embeddings" in key else noise / math.sqrt(value[0].numel()))


@functools.cache
def tiny_state(name: str, seed: int = 0) -> dict[str, Tensor]:
    """State dict of a tiny model of the variant; do not change it in place."""
    state = build_model(tiny_config(VARIANTS[name])).state_dict()
    fill(state, seed)
    return state


def fresh_model(name: str, **changes: Any) -> LatentDiffusion:
    """A model with weights of its own, to be changed at will, and no tokenizer.

    Args:
        name: Key of ``VARIANTS``.
        changes: Fields of its config that differ.
    """
    model = build_model(tiny_config(VARIANTS[name], **changes))
    model.load_state_dict({**model.state_dict(), **tiny_state(name)})
    return model


@functools.cache
def sentencepiece_model(seed: int = 0, size: int = 420) -> bytes:
    """A sentencepiece model trained on a few sentences, of the form XLM-R's has; other seeds, other vocabularies."""
    import sentencepiece

    text = [sentence[seed * 7 :] for sentence in SENTENCES]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 3),
        model_writer=file,
        vocab_size=size,
        model_type="unigram",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return file.getvalue()


@functools.cache
def vocabulary_size() -> int:
    """Rows of the tiny word embeddings: pieces, <pad> and <mask>."""
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).get_piece_size()) + 2


def write_tokenizer(folder: Path, seed: int = 0, size: int = 420) -> None:
    """The tokenizer files of a released folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.bpe.model").write_bytes(sentencepiece_model(seed, size))
    tokens = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    settings = {**tokens, "model_max_length": 512, "tokenizer_class": "XLMRobertaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_config(path: Path, variant: Variant, **model_params: Any) -> None:
    """A config.yaml (JSON is YAML)."""
    path.write_text(json.dumps(config_data(variant, **model_params), indent=1))


def write_flagai_folder(folder: Path, name: str, state: Mapping[str, Tensor] | None = None) -> Path:
    """A model folder as FlagAI downloads it."""
    write_tokenizer(folder)
    write_config(folder / "config.yaml", VARIANTS[name])
    weights = dict(tiny_state(name) if state is None else state)
    torch.save({"state_dict": weights, "global_step": 1234}, folder / "model.ckpt")
    processor = {"crop_size": 224, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor", "size": 224}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_hub_cache(root: Path, name: str, commit: str = "0123abc") -> Path:
    """An entry of a Hugging Face cache that holds a FlagAI folder: blobs, links to them, and a ref."""
    plain = write_flagai_folder(root / "plain", name)
    entry = root / "models--BAAI--AltDiffusion-m9"
    snapshot = entry / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted(plain.iterdir())):
        file.rename(entry / "blobs" / f"{i:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:064x}")
    plain.rmdir()
    return entry


CHECKER_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CHECKER_PROJECTION = 24


def checker_state(concept_threshold: float) -> dict[str, Tensor]:
    """A safety checker's weights, key by key as the released file has them.

    Args:
        concept_threshold: Cosine above which a picture is flagged: below -1 flags every picture, above 1 none.
    """
    width, inner, patch = (CHECKER_SIZES[k] for k in ("hidden_size", "intermediate_size", "patch_size"))
    places = (CHECKER_SIZES["image_size"] // patch) ** 2 + 1
    tower = "vision_model.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.class_embedding": (width,),
        f"{tower}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{tower}embeddings.position_embedding.weight": (places, width),
        "visual_projection.weight": (CHECKER_PROJECTION, width),
        "concept_embeds": (17, CHECKER_PROJECTION),
        "special_care_embeds": (3, CHECKER_PROJECTION),
    }
    norms = [f"{tower}pre_layrnorm", f"{tower}post_layernorm"]
    for i in range(CHECKER_SIZES["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        for name, (out, given) in {
            **{f"self_attn.{p}_proj": (width, width) for p in "kvq"},
            "self_attn.out_proj": (width, width),
            "mlp.fc1": (inner, width),
            "mlp.fc2": (width, inner),
        }.items():
            shapes |= {f"{layer}{name}.weight": (out, given), f"{layer}{name}.bias": (out,)}
    shapes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    state = {key: torch.empty(shape) for key, shape in shapes.items()}
    fill(state, seed=5)
    for key in ("concept_embeds", "special_care_embeds"):
        state[key] = torch.randn(state[key].shape, generator=torch.Generator().manual_seed(6))
    state["concept_embeds_weights"] = torch.full((17,), concept_threshold)
    state["special_care_embeds_weights"] = torch.full((3,), 2.0)
    state[f"{tower}embeddings.position_ids"] = torch.arange(places)[None]
    return state


def write_safety_checker(folder: Path, concept_threshold: float, *, safetensors: bool = False) -> Path:
    """The folder of a safety checker."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["StableDiffusionSafetyChecker"],
        "projection_dim": CHECKER_PROJECTION,
        "vision_config": {**CHECKER_SIZES, "hidden_act": "quick_gelu", "model_type": "clip_vision_model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = checker_state(concept_threshold)
    if safetensors:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder


ALTCLIP_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 514,
    "project_dim": 40,
    "layer_norm_eps": 1e-5,
}
ALTCLIP_WIDTH = 24
"""Of the space in which texts and images meet."""


def altclip_config(**text: Any) -> AltCLIPConfig:
    """Sizes of a tiny matching model; no two of them are equal by chance."""
    sizes = {"vocab_size": vocabulary_size(), "has_pooler": True, **ALTCLIP_TEXT, **text}
    return AltCLIPConfig(
        text=TextEncoderConfig(**sizes), vision=VisionConfig(**CHECKER_SIZES), projection_dim=ALTCLIP_WIDTH
    )


def altclip_state(**text: Any) -> dict[str, Tensor]:
    """Weights of a tiny matching model with the constants of the released files."""
    config = altclip_config(**text)
    state = AltCLIP(config).state_dict()
    fill(state, seed=9)
    state["vision_model.embeddings.class_embedding"].mul_(5)
    places = config.vision.num_patches + 1
    return {**state, "vision_model.embeddings.position_ids": torch.arange(places)[None]}


def write_altclip_folder(
    folder: Path,
    layout: str = "flagai",
    *,
    state: Mapping[str, Tensor] | None = None,
    safetensors: bool = False,
    text: Mapping[str, Any] | None = None,
) -> Path:
    """A matching model as FlagAI's hub has it, or as Hugging Face has it.

    Args:
        folder: To make.
        layout: ``"flagai"`` or ``"huggingface"``.
        state: The weights; random ones if left out.
        safetensors: Whether they are in that format.
        text: Further fields of ``text_config``.
    """
    write_tokenizer(folder)
    vision = {**CHECKER_SIZES, "hidden_act": "quick_gelu", "model_type": "clip_vision_model"}
    kinds = {
        "flagai": ("CLIPHF", "clip", "xlm-roberta"),
        "huggingface": ("AltCLIPModel", "altclip", "altclip_text_model"),
    }
    architecture, kind, text_kind = kinds[layout]
    sizes = {**ALTCLIP_TEXT, "vocab_size": vocabulary_size(), "model_type": text_kind, **(text or {})}
    config = {
        "architectures": [architecture],
        "model_type": kind,
        "projection_dim": ALTCLIP_WIDTH,
        "text_config": sizes,
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config))
    side = CHECKER_SIZES["image_size"]
    kind_of_size = {"flagai": side, "huggingface": {"shortest_edge": side}}[layout]
    processor = {
        "crop_size": side,
        "size": kind_of_size,
        "resample": 3,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    weights = dict(altclip_state() if state is None else state)
    if safetensors:
        save_file(weights, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder
