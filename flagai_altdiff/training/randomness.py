"""Random numbers of training: each from a key of its own, never from a state that a process or a worker moves on."""

from __future__ import annotations

import hashlib

import torch


def number(seed: int, *key: int | str) -> int:
    """A number of 63 bits that the key alone decides, the same on every machine.

    Args:
        seed: The run's.
        key: What it is for, and of what: ``"noise", epoch, position``.
    """
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by :func:`number`; arguments as there."""
    return torch.Generator().manual_seed(number(seed, *key))
