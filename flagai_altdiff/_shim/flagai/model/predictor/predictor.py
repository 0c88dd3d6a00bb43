"""FlagAI's name for :class:`flagai_altdiff.Predictor`."""

from flagai_altdiff.predictor import Predictor

__all__ = ["Predictor"]
