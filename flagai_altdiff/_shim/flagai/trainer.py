"""FlagAI's import path for its Trainer."""

from flagai_altdiff.trainer import Trainer

__all__ = ["Trainer"]
