"""FlagAI's name for :class:`flagai_altdiff.AutoLoader`."""

from flagai_altdiff.auto_loader import AutoLoader

__all__ = ["AutoLoader"]
