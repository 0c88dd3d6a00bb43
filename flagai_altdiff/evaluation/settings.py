"""The protocol's settings, and where the weights are that it takes. No torch."""

from __future__ import annotations

from typing import Any

PROTOCOL: dict[str, Any] = {
    "sampler": "ddim",
    "steps": 50,
    "guidance_scale": 9.0,
    "eta": 0.0,
    "seed": 54551,
    "batch_size": 10,
}
"""Settings of a request. The size is the model's, the negative prompt empty, and seeds are per image."""

BOOTSTRAP = 200
"""How often is resampled unless it is said: enough for the ends of an interval, and bearable for FID."""

INCEPTION_WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
FETCH_INCEPTION = f"curl -LO {INCEPTION_WEIGHTS}"
"""The command that gets the weights of FID's network."""
