"""FlagAI's import path for its Trainer."""

from flagai_altdiff.training.scripted import Trainer

__all__ = ["Trainer"]
