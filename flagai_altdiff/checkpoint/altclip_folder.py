"""Folders of matching models: FlagAI's (``config.json`` of type ``clip``) and Hugging Face's (of type ``altclip``).

Both have the same names of weights. Sizes are told from the weights: configs of released files say other ones.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from torch import Tensor

from flagai_altdiff.checkpoint.diffusers_folder import read_weights
from flagai_altdiff.checkpoint.json_config import ConfigFile, build, load_json
from flagai_altdiff.checkpoint.saving import taken, write_safetensors
from flagai_altdiff.checkpoint.structure import count_blocks
from flagai_altdiff.clip_images import CLIP_MEAN, CLIP_STD
from flagai_altdiff.config import AltCLIPConfig, TextEncoderConfig, VisionConfig
from flagai_altdiff.errors import CheckpointError, printable
from flagai_altdiff.files import new_folder
from flagai_altdiff.tokenizer import MAX_TOKENS

logger = logging.getLogger(__name__)

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_KINDS = {"clip": (12, 1e-12), "altclip": (16, 1e-5)}
"""``model_type`` -> heads and epsilon of the text tower where a file leaves them out."""
_XLM_R = {"hidden_act": "gelu", "pad_token_id": 1, "position_embedding_type": "absolute"}
"""What every XLM-R is, and no weight tells."""
_TEXT, _VISION = "text_model.", "vision_model."
_LAYERS = f"{_VISION}encoder.layers."
_PRE_READ_OUT = f"{_TEXT}transformation_pre."
_CONSTANTS = ("position_ids", "token_type_ids")
"""Buffers that older files have."""
_SPELLINGS = (
    (f"{_TEXT}roberta.encoder.layers.", f"{_TEXT}roberta.encoder.layer."),
    (f"{_VISION}encoder.layer.", _LAYERS),
)
"""Other releases of transformers than the models' write the number of layers the other way; each spelling and ours."""


def is_altclip_folder(folder: Path) -> bool:
    """Whether a folder may be a matching model's by its names; :func:`read` tells whether it is."""
    return (folder / CONFIG).is_file()


def read(folder: Path) -> tuple[AltCLIPConfig, dict[str, Tensor]]:
    """Config and weights of a matching model.

    Args:
        folder: With ``config.json`` and the weights, whole or in shards, safetensors or pickles.

    Raises:
        ConfigError: The config is of another model, or cannot be built.
        CheckpointError: The weights are of another model, are not whole, or have another read-out than the config says.
    """
    file = load_json(folder / CONFIG)
    kind = file.choice("model_type", {name: name for name in _KINDS}, "")
    text, vision = _section(file, "text_config"), _section(file, "vision_config")
    state = as_spelled_here(read_weights(folder.parent, folder.name), str(folder))
    if not any(key.startswith(f"{_TEXT}roberta.") for key in state):
        first = ", ".join(sorted(state)[:3])
        raise CheckpointError(f"{folder} is no AltCLIP: it has no XLM-R text tower ({_TEXT}roberta.*), but {first}.")
    where = str(folder)
    config = build(
        file.path,
        AltCLIPConfig,
        text=_text_config(text, state, where, *_KINDS[kind]),
        vision=_vision_config(vision, state, where),
        projection_dim=shape_of(state, "text_projection.weight", where, 2)[0],
    )
    _tell_differences(file, text, vision, config)
    if not config.text.has_pre_transformation:
        state = {key: value for key, value in state.items() if not key.startswith(_PRE_READ_OUT)}
    return config, state


def write(target: Path, config: AltCLIPConfig, state: Mapping[str, Tensor], tokenizer: Sequence[Path]) -> None:
    """Write a matching model as Hugging Face has it; FlagAI's loader here reads it too. It appears whole or not at all.

    Args:
        target: The folder to make; must not exist.
        config: The model's.
        state: Its weights.
        tokenizer: Files to copy.

    Raises:
        CheckpointError: ``target`` exists.
    """
    said = {"model_type": "altclip_text_model", **asdict(config.text)}
    if not said.pop("has_pre_transformation"):
        said.pop("has_pooler")
    vision = {"model_type": "altclip_vision_model", "projection_dim": config.projection_dim, **asdict(config.vision)}
    fields = {
        "architectures": ["AltCLIPModel"],
        "model_type": "altclip",
        "projection_dim": config.projection_dim,
        "text_config": said,
        "vision_config": vision,
    }
    side = config.vision.image_size
    processor = {"crop_size": side, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}}
    processor |= {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
    try:
        with new_folder(target) as made:
            for name, content in ((CONFIG, fields), (PREPROCESSOR, processor)):
                (made / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            weights = {k: v for k, v in state.items() if not k.endswith(_CONSTANTS)}
            write_safetensors(made / "model.safetensors", weights)
            for file in tokenizer:
                shutil.copyfile(file, made / file.name)
    except FileExistsError as error:
        raise taken(target) from error


def as_spelled_here(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights under the keys of the released files, without constants.

    Args:
        weights: As they are in a file.
        where: The file or folder, for errors.

    Raises:
        CheckpointError: A weight is there under two spellings.
    """
    state: dict[str, Tensor] = {}
    for key, value in weights.items():
        for other, ours in _SPELLINGS:
            if key.startswith(other):
                key = ours + key.removeprefix(other)
        if key in state:
            raise CheckpointError(
                f"{where} has {printable(key, 120)} twice, under an old and a new name. Fetch it again."
            )
        if not key.endswith(_CONSTANTS):
            state[key] = value
    return state


def shape_of(state: Mapping[str, Tensor], key: str, where: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a weight, that must be there and have so many dimensions."""
    found = state.get(key)
    if found is None or found.ndim != dimensions or 0 in found.shape:
        has = "is missing" if found is None else f"has the shape {list(found.shape)[:8]}"
        raise CheckpointError(f"{where} is not a whole AltCLIP model: {key} {has}.")
    return tuple(found.shape)


def _section(file: ConfigFile, name: str) -> ConfigFile:
    """Where a file has a section twice, the one with ``_dict`` counts; so transformers does it."""
    fields = file.fields.get(f"{name}_dict") or file.fields.get(name)
    if not isinstance(fields, dict):
        raise file.error(name, "a mapping")
    return ConfigFile(file.path, fields)


def _text_config(
    file: ConfigFile, state: Mapping[str, Tensor], where: str, usual_heads: int, usual_eps: float
) -> TextEncoderConfig:
    file.check({name: value for name, value in _XLM_R.items() if file.fields.get(name) is not None})
    table, width = shape_of(state, f"{_TEXT}roberta.embeddings.word_embeddings.weight", where, 2)
    key = f"{_TEXT}roberta.embeddings.position_embeddings.weight"
    places = shape_of(state, key, where, 2)[0]
    if places < MAX_TOKENS + 2:  # the first two are nobody's and the padding's
        raise CheckpointError(
            f"{where}: {key} has {places} rows; expected {MAX_TOKENS + 2} for {MAX_TOKENS} tokens at least."
        )
    return build(
        file.path,
        TextEncoderConfig,
        hidden_size=width,
        num_hidden_layers=count_blocks(state, _TEXT + r"roberta\.encoder\.layer\.([0-9]+)\."),
        num_attention_heads=file.integer("num_attention_heads", usual_heads),
        intermediate_size=shape_of(state, f"{_TEXT}roberta.encoder.layer.0.intermediate.dense.weight", where, 2)[0],
        vocab_size=table,
        max_position_embeddings=places,
        layer_norm_eps=file.number("layer_norm_eps", usual_eps),
        project_dim=shape_of(state, f"{_TEXT}transformation.weight", where, 2)[0],
        has_pre_transformation=_has_pre_read_out(file, state, where),
        has_pooler=f"{_TEXT}roberta.pooler.dense.weight" in state,
    )


def _has_pre_read_out(file: ConfigFile, state: Mapping[str, Tensor], where: str) -> bool:
    """Whether images are drawn from the state before the last layer. Where the config is silent they are not, whatever
    weights lie there: so FlagAI does it."""
    said, there = file.fields.get("has_pre_transformation"), f"{_PRE_READ_OUT}weight" in state
    if said is None:
        return False
    if file.flag("has_pre_transformation", False) != there:
        has = "have" if there else "lack"
        raise CheckpointError(
            f"{where}: {CONFIG} says has_pre_transformation={said}, but the weights {has} {_PRE_READ_OUT}weight. "
            "They belong to different models; fetch both again."
        )
    return there


def _vision_config(file: ConfigFile, state: Mapping[str, Tensor], where: str) -> VisionConfig:
    width, _, patch, _ = shape_of(state, f"{_VISION}embeddings.patch_embedding.weight", where, 4)
    places = shape_of(state, f"{_VISION}embeddings.position_embedding.weight", where, 2)[0]
    side = round((places - 1) ** 0.5)
    if side * side + 1 != places:
        raise CheckpointError(f"{where}: {places} positions are no square of patches and a class token.")
    said = file.integer("image_size", 224)  # what is left over at the edge is not seen
    return build(
        file.path,
        VisionConfig,
        hidden_size=width,
        num_hidden_layers=count_blocks(state, _VISION + r"encoder\.layers\.([0-9]+)\."),
        num_attention_heads=file.integer("num_attention_heads", 12),
        intermediate_size=shape_of(state, f"{_VISION}encoder.layers.0.mlp.fc1.weight", where, 2)[0],
        image_size=said if said // patch == side else side * patch,
        patch_size=patch,
        hidden_act=_activation(file),
        layer_norm_eps=file.number("layer_norm_eps", 1e-5),
    )


def _activation(file: ConfigFile) -> Literal["quick_gelu", "gelu"]:
    chosen = file.choice("hidden_act", {"quick_gelu": "quick_gelu", "gelu": "gelu"}, "quick_gelu")
    return "gelu" if chosen == "gelu" else "quick_gelu"


def _tell_differences(file: ConfigFile, text: ConfigFile, vision: ConfigFile, config: AltCLIPConfig) -> None:
    """Say once where the weights have another size than the config."""
    pairs = [(file, "projection_dim", config.projection_dim)]
    pairs += [(text, name, getattr(config.text, name)) for name in ("hidden_size", "num_hidden_layers", "project_dim")]
    pairs += [(vision, name, getattr(config.vision, name)) for name in ("hidden_size", "num_hidden_layers")]
    pairs += [(vision, name, getattr(config.vision, name)) for name in ("image_size", "patch_size")]
    wrong = [
        f"{name}={said.fields[name]!r}, it is {got}" for said, name, got in pairs if said.fields.get(name, got) != got
    ]
    if wrong:
        logger.warning(
            "%s is not the config of these weights, which are believed: %s.",
            printable(str(file.path)),
            "; ".join(wrong),
        )
