"""What is made small in training: the error of each image's denoising, of each text's feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flagai_altdiff.models import LatentDiffusion


def denoising_losses(
    model: LatentDiffusion, latents: Tensor, cond: Tensor, t: Tensor, noise: Tensor, *, min_snr_gamma: float = 0.0
) -> Tensor:
    """Mean squared error of the UNet's prediction for each image (Ho et al. 2020, eq. 14).

    Args:
        model: Its parameterization decides what is predicted.
        latents: (B, C, h, w), scaled.
        cond: (B, L, D), text states.
        t: (B,), timesteps.
        noise: (B, C, h, w).
        min_snr_gamma: Weigh the timesteps by min(signal-to-noise ratio, gamma) (Hang et al. 2023, arXiv 2303.09556);
            0 weighs them alike.

    Returns:
        (B,).
    """
    output = model.apply_model(model.q_sample(latents, t, noise), t, cond).float()
    losses = F.mse_loss(output, model.prediction_target(latents, t, noise), reduction="none").mean(dim=(1, 2, 3))
    return losses if not min_snr_gamma else losses * _min_snr_weights(model, t, min_snr_gamma)


def _min_snr_weights(model: LatentDiffusion, t: Tensor, gamma: float) -> Tensor:
    snr = model.alphas_cumprod[t] / (1 - model.alphas_cumprod[t])
    divisor = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[model.parameterization]
    return snr.clamp(max=gamma) / divisor


def feature_losses(found: Tensor, wanted: Tensor, kind: str) -> Tensor:
    """How far each feature is from the one that it should be.

    Args:
        found: (B, D).
        wanted: (B, D).
        kind: ``"mse"``, mean over the components; or ``"cosine"``, 1 minus the cosine similarity.

    Returns:
        (B,).
    """
    if kind == "cosine":  # 1 - cos, in the form that keeps its digits where the two are nearly the same
        return (F.normalize(found, dim=-1) - F.normalize(wanted, dim=-1)).square().sum(dim=-1) / 2
    return F.mse_loss(found, wanted, reduction="none").mean(dim=-1)
