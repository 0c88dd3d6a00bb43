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
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.data.prior import PREFIX
from flagai_altdiff.training.losses import denoising_losses, feature_losses
from flagai_altdiff.training.randomness import generator

Batch = Mapping[str, Any]
"""``image`` (B, 3, H, W) in [-1, 1], ``caption`` and ``key`` (B texts), ``epoch``, ``position`` (B,) int64."""
Gather = Callable[[Tensor], Tensor]
"""(B, ...) of this process -> (B of all processes, ...), with gradients."""


class Objective(Protocol):
    """One kind of training."""

    @property
    def model(self) -> nn.Module:
        """What learns."""
        ...

    def __call__(self, batch: Batch, gather: Gather) -> Tensor:
        """Losses of the samples of a batch, (B,)."""
        ...


class Denoising:
    """The UNet learns to tell the noise from the image, told what the image shows.

    Args:
        model: Its UNet learns, and its text encoder where the stage says so.
        settings: Of the stage.
        seed: Of the run.
    """

    def __init__(self, model: LatentDiffusion, settings: StageSettings, seed: int) -> None:
        self.model: LatentDiffusion = model
        self._settings, self._seed = settings, seed
        self._text_learns = re.match(settings.pattern, "cond_stage_model.") is not None

    def __call__(self, batch: Batch, gather: Gather) -> Tensor:
        """As :class:`Objective`."""
        model, device = self.model, self.model.device
        places = [(int(batch["epoch"]), int(position)) for position in batch["position"]]
        latents = self._latents(batch, places)
        noise = torch.stack([self._noise(latents.shape[1:], *place) for place in places]).to(device)
        steps = [torch.randint(model.num_timesteps, (), generator=self._generator("timestep", *p)) for p in places]
        captions = [self._kept(text, *place) for text, place in zip(batch["caption"], places, strict=True)]
        with torch.set_grad_enabled(self._text_learns):
            cond = model.get_learned_conditioning(captions)
        gamma = self._settings.min_snr_gamma
        losses = denoising_losses(model, latents, cond, torch.stack(steps).to(device), noise, min_snr_gamma=gamma)
        return losses * torch.tensor([self._weight(key) for key in batch["key"]], device=device)

    @torch.no_grad()
    def _latents(self, batch: Batch, places: list[tuple[int, int]]) -> Tensor:
        posterior = self.model.encode_first_stage(batch["image"].to(self.model.device))
        draws = [torch.randn(posterior.mean.shape[1:], generator=self._generator("latent", *place)) for place in places]
        draw = torch.stack(draws).to(posterior.mean)
        return self.model.get_first_stage_encoding(posterior.mean + posterior.std * draw).float()

    def _weight(self, key: str) -> float:
        return self._settings.prior_weight if key.startswith(PREFIX) else 1.0

    def _noise(self, shape: torch.Size, epoch: int, position: int) -> Tensor:
        numbers = self._generator("noise", epoch, position)
        noise = torch.randn(shape, generator=numbers)
        if self._settings.noise_offset:
            noise += self._settings.noise_offset * torch.randn(shape[0], 1, 1, generator=numbers)
        return noise

    def _kept(self, text: str, epoch: int, position: int) -> str:
        dropped = torch.rand((), generator=self._generator("text drop", epoch, position)) < self._settings.row.text_drop
        return "" if dropped else text

    def _generator(self, purpose: str, epoch: int, position: int) -> torch.Generator:
        return generator(self._seed, purpose, epoch, position)


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
        with torch.no_grad():
            wanted = self._teach(list(batch["english"])).to(self.model.device)
        return feature_losses(
            self.model.text_model.pooled(self.model.token_ids(batch["caption"]))[1], wanted, self._loss
        )


class ContrastiveTuning:
    """The text tower learns to find the image of each text among those of the whole batch; the image tower is frozen.

    Args:
        model: Its text tower learns.
    """

    def __init__(self, model: AltCLIP) -> None:
        self.model: AltCLIP = model

    def __call__(self, batch: Batch, gather: Gather) -> Tensor:
        """As :class:`Objective`. Every process computes the loss of all samples, from gathered features."""
        model = self.model
        with torch.no_grad():
            pixels = model.transform.transform.normalised(batch["image"].to(model.device))
            images = F.normalize(model.get_image_features(pixels), dim=-1)
        texts = F.normalize(model.get_text_features(model.token_ids(batch["caption"])), dim=-1)
        texts, images = gather(texts), gather(images)
        logits = model.logit_scale.exp() * texts @ images.T
        partners = torch.arange(len(logits), device=logits.device)
        both = (F.cross_entropy(side, partners, reduction="none") for side in (logits, logits.T))
        return torch.stack(list(both)).mean(dim=0)
