"""The command ``altdiff``."""

from flagai_altdiff.cli.main import main

__all__ = ["main"]
