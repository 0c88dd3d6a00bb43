"""Parts from other files: words that were learnt (textual inversion), and another autoencoder.

**Source**: Gal et al. 2022 (arXiv 2208.01618) for textual inversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flagai_altdiff import checkpoint
from flagai_altdiff.added import AddedPart
from flagai_altdiff.checkpoint.diffusers_folder import read_weights, weight_files
from flagai_altdiff.checkpoint.diffusers_keys import to_ldm
from flagai_altdiff.checkpoint.json_config import load_json
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.errors import CheckpointError, InvalidRequestError, last_net, printable
from flagai_altdiff.files import short_hash
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.quantizing import refuse_quantized

_NEARLY = 1e-3
_AUTOENCODER = "first_stage_model."
_MOST_TOKENS = 75
_WIDTHS_OF_CLIP = (768, 1024)
_SCALE = "scaling_factor"
_OTHERS = ("loss.", "model_ema.", "discriminator.")
"""What trainers of autoencoders leave in their files."""


def add_embedding(model: LatentDiffusion, path: str | Path, word: str = "") -> str:
    """Teach a model a word that was learnt elsewhere; ``model.parts`` says which ones it has.

    Args:
        model: Changed in place.
        path: A1111's or diffusers' file of a textual inversion, for an encoder of the same width (XLM-R's, not CLIP's).
        word: How it is typed in prompts; the one in the file, else the file's name, unless given.

    Returns:
        The word.

    Raises:
        CheckpointError: It is no such file, or for an encoder of another width.
        InvalidRequestError: The model knows the word already, or is quantized.
    """
    path = Path(path)
    refuse_quantized(model, "word", str(path))
    with last_net(path):
        found, vectors = _embedding(path)
        word = word or found or path.stem
        table = model.cond_stage_model.roberta.embeddings.word_embeddings
        width = table.weight.shape[1]
        if vectors.shape[1] != width:
            clip = " It was made for CLIP." if vectors.shape[1] in _WIDTHS_OF_CLIP else ""
            raise CheckpointError(
                f"{path} has vectors of width {vectors.shape[1]}, but this model's text encoder has {width}.{clip}"
            )
        assert model.text_tokenizer is not None, "load the model from its folder, which has a tokenizer"
        try:
            tokenizer = model.text_tokenizer.with_word(word, len(vectors))
        except ValueError as error:
            raise InvalidRequestError("word", word, str(error)) from error
        room = len(tokenizer) - len(vectors) - len(table.weight)
        new = torch.cat([table.weight[: len(tokenizer) - len(vectors)], vectors.to(table.weight)])
        if room > 0:
            raise CheckpointError(f"the model's text encoder has fewer words than its tokenizer, by {room}.")
        table.weight = nn.Parameter(new, requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(new)
        encoder = replace(model.config.cond_stage, vocab_size=len(new))
        model.config, model.cond_stage_model.config = replace(model.config, cond_stage=encoder), encoder
        model.text_tokenizer = tokenizer
        model.parts = (*model.parts, AddedPart(kind="embedding", name=word, sha256=short_hash(path)))
    return word


def _embedding(path: Path) -> tuple[str, Tensor]:
    """The word that a file names, if it does, and its vectors, (n, D)."""
    tensors = {key: tensor for key, tensor in read_tensors(path).items() if tensor.is_floating_point()}
    if len(tensors) != 1:
        keys = ", ".join(printable(key, 80) for key in sorted(tensors)[:3])
        raise CheckpointError(f"{path} is no textual inversion: expected the vectors of one word, found {keys}.")
    ((key, tensor),) = tensors.items()
    vectors = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    if not 0 < len(vectors) <= _MOST_TOKENS or not vectors.isfinite().all():
        raise CheckpointError(f"{path} is broken: expected 1 to {_MOST_TOKENS} vectors of finite numbers.")
    plain = key.removeprefix("string_to_param.")
    return ("" if plain in ("*", "emb_params") else plain), vectors.float()


def use_vae(model: LatentDiffusion, path: str | Path) -> None:
    """Give a model another autoencoder; ``model.parts`` says which one it has.

    Args:
        model: Changed in place.
        path: A file of LDM's or diffusers' layout, or the folder of an autoencoder in diffusers' layout, as the
            well-known ones of Stable Diffusion come.

    Raises:
        CheckpointError: It is no autoencoder, or one of another architecture; the model stays as it was.
    """
    path = Path(path)
    with last_net(path):
        tensors = read_weights(path.parent, path.name) if path.is_dir() else read_tensors(path)
        state = autoencoder_state(tensors, model.config)
        if not state:
            keys = ", ".join(printable(key, 80) for key in sorted(tensors)[:3])
            raise CheckpointError(f"{path} is no autoencoder: its keys are {keys}.")
        _check_scale(path, model.config.scale_factor)
        checkpoint.assign(model.first_stage_model, state, str(path))
    digest = short_hash(weight_files(path.parent, path.name)[0] if path.is_dir() else path)
    others = tuple(part for part in model.parts if part.kind != "vae")
    model.parts = (*others, AddedPart(kind="vae", name=path.stem, sha256=digest))


def _check_scale(path: Path, scale: float) -> None:
    """CheckpointError where an autoencoder in diffusers' layout says that its latents are scaled otherwise."""
    config = path / "config.json"
    if path.is_dir() and config.is_file():
        own = load_json(config).number(_SCALE, scale)
        if abs(own - scale) > _NEARLY * scale:
            raise CheckpointError(
                f"{path} scales its latents by {own:g}, this model by {scale:g}: it is for another one."
            )


def autoencoder_state(tensors: Mapping[str, Tensor], config: LatentDiffusionConfig) -> dict[str, Tensor]:
    """The weights of an autoencoder under LDM's names, without a prefix; empty where there are none.

    Args:
        tensors: Of a whole model or of an autoencoder, in LDM's or diffusers' layout.
        config: Of the model that it is for.
    """
    own = {key.removeprefix(_AUTOENCODER): value for key, value in tensors.items()}
    if any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in own):
        own = {key.removeprefix(_AUTOENCODER): value for key, value in to_ldm({"vae": own}, config).items()}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "vae/")
    return {key: value for key, value in own.items() if key.startswith(parts) and not key.startswith(_OTHERS)}
