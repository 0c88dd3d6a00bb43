"""Programs that some tests need and not every machine has: without them a test is left out, but never in CI."""

from __future__ import annotations

import os

import pytest

HOW = "`make browser` sets up what Debian has (nodejs, npm, chromium, curl)"


def needed(there: object, name: str) -> None:
    """Leave a test out, saying so, where a program is not there; in CI, fail."""
    if there:
        return
    if os.environ.get("CI"):
        pytest.fail(f"{name} is missing; .ci/run must set it up")
    pytest.skip(f"{name} is missing: {HOW}")
