"""What a stage makes small, computed for one batch of one process."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.models.autoencoder import DiagonalGaussianDistribution
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.data.prior import PREFIX
from flagai_altdiff.training.losses import denoising_losses, feature_losses
from flagai_altdiff.training.randomness import generator

Batch = Mapping[str, Any]
"""``image`` (B, 3, H, W) in [-1, 1], ``caption`` and ``key`` (B texts), ``epoch``, ``position`` (B,) int64; or,
computed before, ``moments`` (B, 2C, h, w) of latents and ``states`` (B, L, D) of texts."""
Gather = Callable[[Tensor], tuple[Tensor, int]]
"""(B, ...) of this process -> (B of all processes, ...), with gradients; and the number of this process's first row."""


class Objective(Protocol):
    """One kind of training."""

    @property
    def model(self) -> nn.Module:
        """What learns."""
        ...

    def __call__(self, batch: Batch, gather: Gather) -> Tensor:
        """Losses of the samples of a batch, (B,); it may have none, and has those of other processes for company.

        Of none they are empty, but hang on all that learns as those of a sample do: the processes exchange gradients,
        also on the way back through ``gather``, and each must come by at the same places.
        """
        ...


def text_learns(settings: StageSettings) -> bool:
    """Whether the text encoder is trained."""
    return re.match(settings.pattern, "cond_stage_model.") is not None


class Denoising:
    """The UNet learns to tell the noise from the image, told what the image shows.

    Args:
        model: Its UNet learns, and its text encoder where the stage says so.
        settings: Of the stage.
        seed: Of the run.
    """

    def __init__(self, model: LatentDiffusion, settings: StageSettings, seed: int) -> None:
        self.model: LatentDiffusion = model
        model.first_stage_model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.5 times as fast
        self._settings, self._seed = settings, seed
        self._text_learns = text_learns(settings)
        self._nothing: Tensor | None = None

    def __call__(self, batch: Batch, gather: Gather) -> Tensor:
        """As :class:`Objective`."""
        model, device = self.model, self.model.device
        places = [(int(batch["epoch"]), int(position)) for position in batch["position"]]
        if not places:
            return self._of_nothing()
        latents, cond = self._latents(batch, places), self._cond(batch, places)
        noise = torch.stack([self._noise(latents.shape[1:], *place) for place in places]).to(device)
        steps = [torch.randint(model.num_timesteps, (), generator=self._generator("timestep", *p)) for p in places]
        gamma = self._settings.min_snr_gamma
        losses = denoising_losses(model, latents, cond, torch.stack(steps).to(device), noise, min_snr_gamma=gamma)
        return losses * torch.tensor([self._weight(key) for key in batch["key"]], device=device)

    def _of_nothing(self) -> Tensor:
        model, config = self.model, self.model.config
        side = self._settings.side // config.first_stage.downsampling
        latents = torch.zeros(1, config.unet.in_channels, side, side, device=model.device)
        with torch.set_grad_enabled(self._text_learns):
            cond = model.get_learned_conditioning([""])
        first = torch.zeros(1, dtype=torch.long, device=model.device)
        return denoising_losses(model, latents, cond, first, latents)[:0]

    @torch.no_grad()
    def _latents(self, batch: Batch, places: list[tuple[int, int]]) -> Tensor:
        device = self.model.device
        if "moments" in batch:
            posterior = DiagonalGaussianDistribution(batch["moments"].to(device))
        else:
            posterior = self.model.encode_first_stage(batch["image"].to(device, memory_format=torch.channels_last))
        draws = [torch.randn(posterior.mean.shape[1:], generator=self._generator("latent", *place)) for place in places]
        draw = torch.stack(draws).to(posterior.mean)
        return self.model.get_first_stage_encoding(posterior.mean + posterior.std * draw).float()

    def _cond(self, batch: Batch, places: list[tuple[int, int]]) -> Tensor:
        dropped = [self._drops(*place) for place in places]
        if "states" in batch:
            if self._nothing is None:
                with torch.no_grad():
                    self._nothing = self.model.get_learned_conditioning([""])
            chosen = torch.tensor(dropped, device=self.model.device)[:, None, None]
            return torch.where(chosen, self._nothing, batch["states"].to(self.model.device))
        captions = ["" if drop else text for text, drop in zip(batch["caption"], dropped, strict=True)]
        with torch.set_grad_enabled(self._text_learns):
            return self.model.get_learned_conditioning(captions)

    def _weight(self, key: str) -> float:
        return self._settings.prior_weight if key.startswith(PREFIX) else 1.0

    def _noise(self, shape: torch.Size, epoch: int, position: int) -> Tensor:
        numbers = self._generator("noise", epoch, position)
        noise = torch.randn(shape, generator=numbers)
        if self._settings.noise_offset:
            noise += self._settings.noise_offset * torch.randn(shape[0], 1, 1, generator=numbers)
        return noise

    def _drops(self, epoch: int, position: int) -> bool:
        chance = torch.rand((), generator=self._generator("text drop", epoch, position))
        return float(chance) < self._settings.row.text_drop

    def _generator(self, purpose: str, epoch: int, position: int) -> torch.Generator:
        return generator(self._seed, purpose, epoch, position)


def contrastive_losses(texts: Tensor, others: Tensor, scale: Tensor, gather: Gather) -> Tensor:
    """How badly each text finds its partner among those of all processes, and the reverse (Radford et al. 2021).

    Args:
        texts: (B, D), normalised.
        others: (B, D), normalised; the partners, in the same order.
        scale: What cosines are multiplied with.
        gather: See :data:`Gather`.

    Returns:
        (B,).
    """
    (all_texts, first), (all_others, _) = gather(texts), gather(others)
    partners = torch.arange(first, first + len(texts), device=texts.device)
    both = ((texts, all_others), (others, all_texts))
    losses = [F.cross_entropy(scale * own @ other.T, partners, reduction="none") for own, other in both]
    return torch.stack(losses).mean(dim=0)


class TeacherLearning:
    """The text tower learns a CLIP text tower's feature of a text from the same text in any language.

    Args:
        model: Its text tower learns.
        teach: B English texts -> (B, project_dim), the teacher's features.
        settings: Of the stage.
    """

    def __init__(self, model: AltCLIP, teach: Callable[[list[str]], Tensor], settings: StageSettings) -> None:
        self.model: AltCLIP = model
        self._teach, self._loss = teach, settings.loss

    def __call__(self, batch: Batch, gather: Gather) -> Tensor:
        """As :class:`Objective`; a batch has the English texts under ``english``."""
        model, texts = self.model, list(batch["caption"])
        with torch.no_grad():
            wanted = self._teach(list(batch["english"]) or [""]).to(model.device)[: len(texts)]
        # Of no text they are empty, but hang on what learns, as in ContrastiveTuning.
        found = model.text_model.pooled(model.token_ids(texts or [""]))[1][: len(texts)]
        if self._loss != "contrastive":
            return feature_losses(found, wanted, self._loss)
        found, wanted = F.normalize(found, dim=-1), F.normalize(wanted, dim=-1)
        return contrastive_losses(found, wanted, model.logit_scale.exp(), gather)


class ContrastiveTuning:
    """The text tower learns to find the image of each text among those of the whole batch; the image tower is frozen.

    Args:
        model: Its text tower learns.
    """

    def __init__(self, model: AltCLIP) -> None:
        self.model: AltCLIP = model

    def __call__(self, batch: Batch, gather: Gather) -> Tensor:
        """As :class:`Objective`. Every process compares its own texts and images with those of all."""
        return contrastive_losses(*self._features(batch), self.model.logit_scale.exp(), gather)

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalised, of texts and images."""
        model, captions = self.model, list(batch["caption"])
        texts = F.normalize(model.get_text_features(model.token_ids(captions or [""])), dim=-1)
        if not captions:
            return texts[:0], texts.detach()[:0]
        with torch.no_grad():
            pixels = model.transform.transform.normalised(batch["image"].to(model.device))
            images = F.normalize(model.get_image_features(pixels), dim=-1)
        return texts, images
