"""Random numbers of a training sample, from nothing but the run's seed and the sample's place in it.

No process, worker or device has a say, so a run is the same on any number of them, and goes on from any step.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A generator on the CPU that is always the same for the same arguments.

    Args:
        seed: Of the run.
        key: What the numbers are for, and for which sample: a purpose, an epoch, a position.
    """
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
