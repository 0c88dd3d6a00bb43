"""Files on disk -> tensors with LDM names -> a model, strictly."""

from flagai_altdiff.checkpoint.weights import assign

__all__ = ["assign"]
