"""Environment variables that steer downloads, each read when it is needed; an error about one has its name."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from flagai_altdiff.errors import HubError, shown
from flagai_altdiff.hub.addresses import WEB, check_typed
from flagai_altdiff.progress import is_on

logger = logging.getLogger(__name__)

OFFLINE_VARIABLES = ("FLAGAI_ALTDIFF_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
MIRROR_VARIABLE = "FLAGAI_ALTDIFF_MIRROR"
BAAI_VARIABLE = "FLAGAI_ALTDIFF_BAAI_ENDPOINT"
HF_VARIABLE = "HF_ENDPOINT"
TIMEOUT_VARIABLE = "HF_HUB_DOWNLOAD_TIMEOUT"
CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
"""File or folder of the certificates to trust; the first that is set is used."""
CACHE_VARIABLES = ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
READ_TIMEOUT_S = 30.0
LONGEST_TIMEOUT_S = 86_400.0
SOCKS = ("socks4", "socks4a", "socks5", "socks5h")


def offline_switch() -> str | None:
    """The environment variable that forbids downloads now, as ``NAME=value``; ``None`` if they are allowed."""
    return next((f"{name}={os.environ[name]}" for name in OFFLINE_VARIABLES if is_on(name)), None)


def mirror() -> str | None:
    """Address of a folder of model folders that the user prefers to the hubs, not yet checked."""
    return os.environ.get(MIRROR_VARIABLE, "").strip() or None


def check_mirror() -> None:
    """HubError if :func:`mirror` is no address."""
    if address := mirror():
        check_typed(address, MIRROR_VARIABLE)


def baai_endpoint() -> str:
    """Base address of BAAI's hub, without a slash at its end."""
    return _address(BAAI_VARIABLE, "https://model.baai.ac.cn")


def hf_endpoint() -> str:
    """Base address of Hugging Face or of a mirror of it, without a slash at its end."""
    return _address(HF_VARIABLE, "https://huggingface.co")


def hf_token() -> str:
    """The user's token for Hugging Face, or an empty text; HubError if it cannot be one."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise HubError("HF_TOKEN has spaces or other characters that no token has; set it again or unset it.")
    return token


def hf_cache() -> Path:
    """Folder of Hugging Face's own cache; this package reads it and never writes there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(base, "huggingface")
    place = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expanduser(place)).absolute()  # where nobody's home is known, a place that is not there


def read_timeout_s() -> float:
    """Seconds of silence after which a server is given up."""
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", text) and 0 < float(text) <= LONGEST_TIMEOUT_S:
        return float(text)
    if text:
        _warn_of_timeout(text)
    return READ_TIMEOUT_S


def ca_bundle() -> str | None:
    """The user's own file or folder of trusted certificates; HubError if it cannot be used."""
    name = next((name for name in CERTIFICATE_VARIABLES if os.environ.get(name)), None)
    if name is None:
        return None
    path = os.environ[name]
    import ssl  # takes a while, and only who asks a server needs it

    try:
        if os.path.isdir(path):
            os.listdir(path)
        else:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ValueError) as error:
        reason = "no certificates in PEM format are in it" if isinstance(error, ssl.SSLError) else _reason(error)
        raise HubError(
            f"{name} names {shown(path, 200)}: {reason}. Name a file with certificates in PEM format, or unset it."
        ) from error
    return path


def certificate_advice() -> str:
    """What to do where a server's certificate is refused."""
    name = next((name for name in CERTIFICATE_VARIABLES if os.environ.get(name)), None)
    if name:
        return f"Trusted are only the certificates that {name} names: {shown(os.environ[name], 200)}."
    return f"Where a network replaces certificates, name the file with its own in {CERTIFICATE_VARIABLES[0]}."


def check_proxies() -> None:
    """HubError if a proxy of the environment cannot be used."""
    for name in _proxy_variables():
        check_proxy(os.environ[name])


def check_proxy(proxy: str) -> None:
    """HubError unless ``proxy``, an address from the environment, can be used."""
    name, schemes = proxy_variable(proxy), (*SOCKS, *reversed(WEB))
    check_typed(proxy if "://" in proxy else f"http://{proxy}", name, schemes)
    if proxy.lower().startswith(SOCKS) and importlib.util.find_spec("socks") is None:
        raise HubError(
            f"{name} names a SOCKS proxy: pip install 'requests[socks]', or name an http:// proxy, or unset it."
        )


def proxy_variable(proxy: str) -> str:
    """The name of the environment variable that a proxy comes from."""
    names = (name for name, value in os.environ.items() if name.lower().endswith("_proxy") and value == proxy)
    return next(names, "the proxy in the system's settings")


def in_force() -> list[str]:
    """Names of the variables that are set and decide where downloads come from, and how."""
    names = (MIRROR_VARIABLE, BAAI_VARIABLE, HF_VARIABLE, *_proxy_variables(), *CERTIFICATE_VARIABLES, *CACHE_VARIABLES)
    return [name for name in names if os.environ.get(name)]


CHECKS: tuple[Callable[[], object], ...] = (
    check_mirror,
    baai_endpoint,
    hf_endpoint,
    hf_token,
    ca_bundle,
    check_proxies,
)
"""Every reading that raises HubError where its variable is wrong."""


def _address(name: str, default: str) -> str:
    address = os.environ.get(name, "").strip().rstrip("/") or default
    check_typed(address, name)
    return address


def _proxy_variables() -> list[str]:
    return [name for name in os.environ if re.fullmatch("(https?|all)_proxy", name, re.IGNORECASE) and os.environ[name]]


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@functools.cache
def _warn_of_timeout(text: str) -> None:
    logger.warning(
        "%s=%s is no number of seconds up to %.0f; %.0f are used",
        TIMEOUT_VARIABLE,
        shown(text),
        LONGEST_TIMEOUT_S,
        READ_TIMEOUT_S,
    )
