"""The models of one process: described without their weights, loaded when they are wanted, given up when too many."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from flagai_altdiff.checkpoint.mapped import is_mapped
from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError
from flagai_altdiff.loading import describe_model, load_model
from flagai_altdiff.lora import add_lora, remove_loras
from flagai_altdiff.machine import total_main_memory
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.parts import add_embedding, use_vae
from flagai_altdiff.quantizing import quantize_model
from flagai_altdiff.web.messages import Lora, ModelCard
from flagai_altdiff.web.previews import Previewer
from flagai_altdiff.web.settings import Drawing

logger = logging.getLogger(__name__)

_SHARE = 0.5
"""Of a device's memory, for weights; drawing needs the rest."""


@dataclass
class Loaded:
    """A model that is ready to draw.

    Args:
        model: The model.
        previewer: Shows its latents.
        loras: What is added to it now.
    """

    model: LatentDiffusion
    previewer: Previewer
    loras: tuple[Lora, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of its weights; not of pages of a file that come only while they are at work."""
        weights = (*self.model.parameters(), *self.model.buffers())  # of quantized layers these are buffers
        return sum(w.nbytes for w in weights if self.model.memory == "normal" or not is_mapped(w))


def usual_memory(device: str, sharers: int = 1) -> float:
    """Bytes of weights that a process keeps unless it is told otherwise; infinite where nothing is known of a device.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …; the CPU's memory is the machine's, or its container's.
        sharers: Processes that share it.
    """
    is_cuda = torch.device(device).type == "cuda"
    whole = float(torch.cuda.mem_get_info(device)[1]) if is_cuda else total_main_memory()
    return math.inf if math.isnan(whole) else _SHARE * whole / sharers


class Shelf:
    """Models by name, the least recently used first.

    Args:
        settings: Which ones, and how much memory they may take.
        device: Where they draw.
    """

    def __init__(self, settings: Drawing, device: str) -> None:
        self._settings, self._device = settings, device
        self._most = settings.max_memory or usual_memory(device, settings.sharers)
        self._names = settings.names
        self._loaded: dict[str, Loaded] = {}
        self._loras = {file.stem: file for file in settings.loras}

    def cards(self) -> tuple[tuple[ModelCard, ...], tuple[tuple[str, str], ...]]:
        """What the server must know of each, and the names of those that cannot be had, with why; files are fetched.

        Raises:
            FlagAIAltDiffError: The first one cannot be had.
        """
        first, *others = self._names
        cards, missing = [self._card(first)], list[tuple[str, str]]()
        for name in others:
            try:
                cards.append(self._card(name))
            except FlagAIAltDiffError as error:
                logger.error("%s is not served: %s", name, error)
                missing.append((name, str(error)))
        return tuple(cards), tuple(missing)

    @property
    def has_words(self) -> bool:
        """Whether the models have learnt words of their own."""
        return bool(self._settings.embeddings)

    def get(self, name: str, loras: tuple[Lora, ...] = ()) -> Loaded:
        """A model with just these LoRAs.

        Args:
            name: One of the settings'.
            loras: Names and strengths.

        Raises:
            InvalidRequestError: A name that the settings have not.
            FlagAIAltDiffError: Its files cannot be read.
        """
        if name not in self._names:
            raise InvalidRequestError("model", name, f"expected one of {', '.join(self._names)}")
        loaded = self._loaded.pop(name, None) or self._load(name)
        self._loaded[name] = loaded
        if loaded.loras != loras:
            remove_loras(loaded.model)
            loaded.loras = ()
            for lora, strength in loras:
                add_lora(loaded.model, self._loras[lora], strength, removable=True)
            loaded.loras = loras
        return loaded

    def _load(self, name: str) -> Loaded:
        settings = self._settings
        logger.info("loading %s on %s", name, self._device)
        model = load_model(
            self._names[name],
            settings.model_dir,
            device=self._device,
            dtype="float16" if settings.half else None,
            safety_checker=settings.safety_checker,
            mapped=True,
            memory=settings.memory,
        )
        for file in settings.embeddings:
            add_embedding(model, file)
        if settings.vae:
            use_vae(model, settings.vae)
        if settings.quantize:
            quantize_model(model, settings.quantize)
        loaded = Loaded(model, Previewer(model))
        self._make_room(loaded.size_bytes)
        return loaded

    def _make_room(self, size_bytes: int) -> None:
        while self._loaded and size_bytes + self._size() > self._most:
            oldest = next(iter(self._loaded))
            logger.info("giving up %s: more than %d MB of weights", oldest, self._most / 2**20)
            del self._loaded[oldest]

    def _size(self) -> int:
        return sum(loaded.size_bytes for loaded in self._loaded.values())

    def _card(self, name: str) -> ModelCard:
        spec, config = describe_model(
            self._names[name], self._settings.model_dir, safety_checker=self._settings.safety_checker
        )
        return ModelCard(
            name=name,
            languages=spec.languages,
            licence=spec.licence,
            height=spec.height,
            width=spec.width,
            steps=spec.steps,
            guidance_scale=spec.guidance_scale,
            downsampling=config.first_stage.downsampling,
            halvings=len(config.unet.channel_mult) - 1,
            timesteps=config.timesteps,
        )
