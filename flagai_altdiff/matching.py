"""Texts and images that mean the same: AltCLIP, loaded by name or path, and how well each text fits each image."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flagai_altdiff import checkpoint, hub
from flagai_altdiff.checkpoint import altclip_folder
from flagai_altdiff.checkpoint.json_config import MAX_SIZE, ConfigFile, load_json
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.clip_images import ClipImageTransform, MatchingTransform
from flagai_altdiff.errors import CheckpointError, last_net, printable
from flagai_altdiff.loading import find_device, find_tokenizer
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.registry import DEFAULT_MODEL_DIR, MATCHING, locate
from flagai_altdiff.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCH = 32


def load_matching_model(
    name_or_path: str | Path,
    model_dir: str | Path = DEFAULT_MODEL_DIR,
    *,
    device: str | torch.device | None = None,
    mapped: bool = False,
) -> AltCLIP:
    """Load a matching model from its files, fetching them first if a registered model lacks them.

    Args:
        name_or_path: A registered name, in any case, or the path of a folder, FlagAI's or Hugging Face's.
        model_dir: Folder of the model folders.
        device: Where it computes, for example ``"cuda"``; the CPU if left out.
        mapped: Leave the weights of large files mapped; see :func:`flagai_altdiff.loading.load_model`.

    Returns:
        The model in evaluation mode, float32, with its ``text_tokenizer``, ``transform`` and ``spec``.

    Raises:
        UnknownModelError: Neither a path nor registered for matching.
        InvalidRequestError: ``device`` cannot be used here.
        CheckpointError: The files are not such a model.
        ConfigError: The config cannot be built.
        HubError: Files are missing and could not be fetched.
    """
    place = find_device(device)
    spec, path = locate(name_or_path, Path(model_dir), task=MATCHING)
    if spec and hub.missing_files(spec, path):
        hub.fetch(spec, path)
    with last_net(path):
        if not altclip_folder.is_altclip_folder(path):
            raise CheckpointError(f"{path} is no folder of a matching model: it has no {altclip_folder.CONFIG}.")
        config, state = altclip_folder.read(path)
        tokenizer = load_tokenizer(find_tokenizer(path, config.text.vocab_size))
        if len(tokenizer) > config.text.vocab_size:
            raise CheckpointError(
                f"{tokenizer.path} has {len(tokenizer)} tokens, but the text tower knows {config.text.vocab_size}. "
                "They belong to different models; put the tokenizer of this model beside its weights."
            )
        with torch.device("meta"):
            model = AltCLIP(config)
        _assign(model, state, path, mapped=mapped or place.type != "cpu")
        model.text_tokenizer, model.spec, model.name = tokenizer, spec, spec.name if spec else path.name
        model.transform = find_transform(path, config.vision.image_size)
    logger.info("loaded %s", printable(str(path)))
    return model.eval().to(place)


def load_weights(model: AltCLIP, path: str | Path) -> None:
    """Give a matching model the weights of another file of the same sizes.

    Args:
        model: From :func:`load_matching_model`.
        path: A file with the keys of the released ones, as FlagAI's ``Trainer`` saves them too.

    Raises:
        CheckpointError: The file cannot be read, or has other weights; the model stays as it was.
    """
    with last_net(path):
        _assign(model, altclip_folder.as_spelled_here(read_tensors(Path(path)), str(path)), path)


def _assign(model: AltCLIP, state: Mapping[str, Tensor], where: str | Path, *, mapped: bool = False) -> None:
    """What the model has no place for is left out, as FlagAI does it, and named."""
    wanted = dict(model.named_parameters())
    unknown = sorted(state.keys() - wanted.keys())
    if unknown:
        names = ", ".join(printable(key, 120) for key in unknown[:3]) + (" …" if len(unknown) > 3 else "")
        logger.warning("%s: weights that AltCLIP has no place for have no effect: %s", printable(str(where)), names)
    checkpoint.assign(model, {key: state[key] for key in wanted if key in state}, str(where), mapped=mapped)


def find_transform(folder: Path, image_size: int | None = None) -> MatchingTransform:
    """How images are prepared, as ``preprocessor_config.json`` says; without the file, as CLIP does it.

    Args:
        folder: The model's folder.
        image_size: Side of the images that the model takes, whatever the file says; the file's if left out.
    """
    if not (folder / altclip_folder.PREPROCESSOR).is_file():
        return MatchingTransform(transform=ClipImageTransform(size=image_size or ClipImageTransform.size))
    file = load_json(folder / altclip_folder.PREPROCESSOR)
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not file.flag(step, True):
            raise file.error(step, "true")
    if file.fields.get("resample", 3) != 3:
        raise file.error("resample", "3, which is bicubic")
    if abs(file.number("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise file.error("rescale_factor", "1/255")
    crop, size = _length(file, "crop_size", ("height", "width")), _length(file, "size", ("shortest_edge",))
    side = crop or size or ClipImageTransform.size
    shorter = size or side
    if shorter < side:
        raise file.error("size", f"at least the {side} px of crop_size")
    if image_size and image_size != side:
        logger.warning(
            "%s says %d px, but the weights want %d, which is believed.", printable(str(file.path)), side, image_size
        )
        side = shorter = image_size
    mean, std = _three(file, "image_mean", ClipImageTransform.mean), _three(file, "image_std", ClipImageTransform.std)
    if not min(std) > 0:
        raise file.error("image_std", "three numbers above 0")
    return MatchingTransform(transform=ClipImageTransform(size=side, mean=mean, std=std, shorter=shorter))


@torch.inference_mode()
def match(model: AltCLIP, texts: Iterable[str], images: Iterable[Image.Image]) -> Tensor:
    """How well each text fits each image.

    Args:
        model: From :func:`load_matching_model`.
        texts: N texts, in any of the model's languages; what is beyond 77 tokens has no effect.
        images: M images of any size and mode, of which no more than a batch is kept.

    Returns:
        Cosine similarities (N, M), on the CPU.
    """
    return text_features(model, texts) @ image_features(model, images).T


@torch.inference_mode()
def text_features(model: AltCLIP, texts: Iterable[str]) -> Tensor:
    """Normalised features of N texts, (N, P), on the CPU."""
    ids = (model.token_ids(batch) for batch in _batches(texts))
    found = [F.normalize(model.get_text_features(batch), dim=-1).cpu() for batch in ids]
    return torch.cat(found) if found else torch.zeros(0, model.config.projection_dim)


@torch.inference_mode()
def image_features(model: AltCLIP, images: Iterable[Image.Image]) -> Tensor:
    """Normalised features of M images, (M, P), on the CPU."""
    batches = (torch.stack([model.transform.transform(image) for image in batch]) for batch in _batches(images))
    found = [F.normalize(model.get_image_features(pixels.to(model.device)), dim=-1).cpu() for pixels in batches]
    return torch.cat(found) if found else torch.zeros(0, model.config.projection_dim)


def _batches(values: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(values)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _length(file: ConfigFile, field: str, names: Sequence[str]) -> int | None:
    """Pixels, if a file has them; older files have one number, newer ones a mapping."""
    value = file.fields.get(field)
    if value is None:
        return None
    if isinstance(value, dict):
        lengths = {value.get(name) for name in names}
        value = lengths.pop() if len(lengths) == 1 else None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 4096:
        raise file.error(field, f"a length in pixels, or a mapping of it from {' and '.join(names)}")
    return value


def _three(file: ConfigFile, field: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value = file.fields.get(field, default)
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(type(v) in (int, float) and abs(v) <= MAX_SIZE for v in value)
    ):
        raise file.error(field, "three numbers")
    return tuple(map(float, value))
