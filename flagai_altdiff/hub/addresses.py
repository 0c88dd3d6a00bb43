"""Web addresses that come from people and from servers: which are asked, and how messages show them."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from urllib.parse import urlsplit

from flagai_altdiff.errors import HubError, printable, shown

WEB = ("http", "https")
MAX_LENGTH = 8192
"""Of an address that is asked; those that servers sign are long."""
SHOWN = 200
"""Characters of an address in a message."""


def redact_url(url: str) -> str:
    """``url`` as messages show it: printable, and without user, password, query and fragment, where secrets are."""
    return printable(without_secrets(url), SHOWN)


def without_secrets(url: str) -> str:
    """``url`` without user, password, query and fragment."""
    if trouble(url):
        return _behind_secrets(url)
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def first_line(text: str, length: int = 120) -> str:
    """The first line of a server's text, escaped and shortened."""
    return shown(text[: 10 * length].strip().partition("\n")[0].strip(), length)


def trouble(url: str, schemes: tuple[str, ...] = WEB) -> str | None:
    """Why ``url`` is no address of a server; ``None`` if it is one."""
    if len(url) > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH} characters"
    try:
        parts = urlsplit(url)
        if parts.scheme not in schemes or url.partition("://")[0].lower() != parts.scheme:
            return f"it does not begin with {' or '.join(f'{scheme}://' for scheme in schemes)}"
        if not parts.hostname or parts.port == 0:
            return "it names no server"
    except ValueError:
        return "its server or port cannot be understood"
    return None


def check_url(url: str) -> None:
    """HubError unless ``url`` is http or https and names a host."""
    if problem := trouble(url):
        address = shown(without_secrets(url), SHOWN)
        raise HubError(f"refused the address {address} ({problem}): only http:// and https:// are fetched.")


def check_typed(url: str, name: str, schemes: tuple[str, ...] = WEB) -> None:
    """HubError unless ``url``, which a person wrote into the setting ``name``, is an address without a slip."""
    problem = trouble(url, schemes)
    server = "" if problem else urlsplit(url).netloc
    if re.search(r"[\s\"<>\\^`{|}]|^'|'$", url) or not url.isprintable():
        problem = "it has spaces, quotes or other characters that no address has"
    elif server and not re.fullmatch(r"[\w.:%\[\]-]+", server.rpartition("@")[2]):
        problem = "its server has characters that no name has"
    elif server and not _is_host(urlsplit(url).hostname or ""):
        problem = "its server is no name that can be asked for"
    elif ":" in server and "@" in url.partition(server)[2]:
        problem = "it has an @ behind the server; in a password, write / ? # @ as %2F %3F %23 %40"
    if problem:
        address, example = shown(_behind_secrets(url), SHOWN), f"{schemes[-1]}://name.example"
        raise HubError(f"{name} is {address}: {problem}. Expected for example {example}; set or unset it.")


def _is_host(name: str) -> bool:
    """Whether a server's name can be looked up: no empty part, no character that only looks like another."""
    try:
        return (
            bool(name.encode("idna"))
            and unicodedata.normalize("NFKC", name) == name
            and ("%" not in name or ":" in name)
        )
    except UnicodeError:
        return False


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent there: https, or this machine."""
    parts = urlsplit(url)
    try:
        return parts.scheme == "https" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"


def _behind_secrets(text: str) -> str:
    """What is surely no secret of a text that should be an address."""
    return re.split("[?#]", re.split("@|%40", text)[-1], maxsplit=1)[0][:SHOWN]
