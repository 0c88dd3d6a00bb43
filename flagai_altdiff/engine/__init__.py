"""What runs a model. The pipeline asks for numbers; an engine computes them in its own way, at its own precision."""

from __future__ import annotations

from flagai_altdiff.engine.base import Engine
from flagai_altdiff.engine.choice import check_engine, make_engine, precision_of
from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.packed import PackedEngine

__all__ = ["EagerEngine", "Engine", "PackedEngine", "check_engine", "make_engine", "precision_of"]
