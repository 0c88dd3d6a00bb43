"""Environment variables that steer downloads, each read when it is needed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flagai_altdiff.errors import HubError

OFFLINE_VARIABLES = ("FLAGAI_ALTDIFF_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
MIRROR_VARIABLE = "FLAGAI_ALTDIFF_MIRROR"
BAAI_VARIABLE = "FLAGAI_ALTDIFF_BAAI_ENDPOINT"
BAAI_ENDPOINT = "https://model.baai.ac.cn"
HF_ENDPOINT = "https://huggingface.co"
READ_TIMEOUT_S = 30.0


def offline_switch() -> str | None:
    """The environment variable that forbids downloads now, as ``NAME=value``; ``None`` if they are allowed."""
    return next((f"{name}={os.environ[name]}" for name in OFFLINE_VARIABLES if _is_on(name)), None)


def mirror() -> str | None:
    """Address of a folder of model folders that the user prefers to the hubs."""
    return os.environ.get(MIRROR_VARIABLE, "").strip().rstrip("/") or None


def baai_endpoint() -> str:
    """Base address of BAAI's hub, without a slash at its end."""
    return (os.environ.get(BAAI_VARIABLE) or BAAI_ENDPOINT).rstrip("/")


def hf_endpoint() -> str:
    """Base address of Hugging Face or of a mirror of it, without a slash at its end."""
    return (os.environ.get("HF_ENDPOINT") or HF_ENDPOINT).rstrip("/")


def hf_token() -> str:
    """The user's token for Hugging Face, or an empty text; HubError if it cannot be one."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise HubError("HF_TOKEN has spaces or other characters that no token has; set it again.")
    return token


def hf_cache() -> Path:
    """Folder of Hugging Face's own cache; this package reads it and never writes there."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(base, "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def read_timeout_s() -> float:
    """Seconds of silence after which a server is given up."""
    text = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", "")
    return float(text) if text.isdecimal() and int(text) else READ_TIMEOUT_S


def bars_wanted() -> bool:
    """Whether the user did not switch progress bars off."""
    return not _is_on("HF_HUB_DISABLE_PROGRESS_BARS") and os.environ.get("TERM") != "dumb"


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
