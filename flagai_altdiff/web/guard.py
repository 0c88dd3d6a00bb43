"""The door: who may come in, under which name, from which page, and with how much. Pure ASGI, before anything else."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import re
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flagai_altdiff.web.answers import error_answer
from flagai_altdiff.web.clients import is_loopback
from flagai_altdiff.web.messages import Problem
from flagai_altdiff.web.settings import Access, Limits

logger = logging.getLogger(__name__)

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_ALWAYS_OPEN = ("/healthz", "/readyz")
_SECONDS_FOR_A_BODY = 60.0
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?")
_CONTENT = "; ".join(
    (
        "default-src 'self' data: blob:",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",  # Gradio's own are inline
        "style-src 'self' 'unsafe-inline'",
        "frame-ancestors 'self'",
    )
)
"""Nothing of a page comes from other hosts."""
_HEADERS = (
    (b"content-security-policy", _CONTENT.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"SAMEORIGIN"),
)


class TooLargeError(Exception):
    """A body that is larger than allowed, or takes too long."""


class Guard:
    """Checks host, origin, key and size of every request.

    Args:
        app: What is behind it.
        access: Who is let in.
        limits: How much is taken.
        own_hosts: Names and addresses of this server.
    """

    def __init__(self, app: ASGIApp, access: Access, limits: Limits, own_hosts: Iterable[str]) -> None:
        self._app, self._access, self._limits = app, access, limits
        self._hosts = {"localhost", "127.0.0.1", "[::1]", *map(str.lower, (*own_hosts, *access.hosts))}
        self._is_any_host = "*" in access.hosts
        self._users = [f"{name}:{password}".encode() for name, password in access.users]
        self._keys = [key.encode() for key in access.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As every ASGI application."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, problem, extra = refusal
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await error_answer(scope["path"], status, problem, extra)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, Problem, dict[str, str]] | None:
        if not self._is_any_host and _name_of(headers.get("host", "")) not in self._hosts:
            text = (
                f"this server is not called {headers.get('host', '')[:80]!r}; whoever runs it may add --allow-host NAME"
            )
            return 403, Problem(code="wrong_host", text=text), {}
        if not self._is_own_page(scope, headers):
            text = "requests from pages of other addresses are refused; whoever runs it may add --cors ORIGIN"
            return 403, Problem(code="wrong_origin", text=text), {}
        preflight = scope.get("method") == "OPTIONS" and "access-control-request-method" in headers
        if not (scope["path"] in _ALWAYS_OPEN or preflight or self._knows(headers)):
            extra = {"WWW-Authenticate": 'Basic realm="altdiff", charset="UTF-8"'}
            text = "a key or a password is needed: Authorization: Bearer KEY, or Basic with user and password"
            return 401, Problem(code="invalid_api_key", text=text), extra
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._limits.body_bytes:
            return 413, self._too_large(), {"Connection": "close"}
        return None

    def _too_large(self) -> Problem:
        most = f"{self._limits.body_bytes >> 20} MiB"
        return Problem(code="too_large", text=f"a request may have {most} at most; send smaller pictures")

    def _is_own_page(self, scope: Scope, headers: Headers) -> bool:
        """Whether a request comes from no page at all, from our own, or from one that was named."""
        origin = headers.get("origin")
        if origin is None:
            cross = headers.get("sec-fetch-site") in ("cross-site", "same-site")
            return not cross or (scope.get("method") in _SAFE_METHODS and headers.get("sec-fetch-mode") == "navigate")
        return origin in self._access.origins or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()

    def _knows(self, headers: Headers) -> bool:
        """Whether a request carries a key or a password; compared in constant time, all of them."""
        if self._access.is_open:
            return True
        kind, _, value = headers.get("authorization", "").partition(" ")
        given, user = headers.get("x-api-key", "").encode(), b""
        if kind.lower() == "bearer":
            given = value.strip().encode()
        elif kind.lower() == "basic":
            try:
                user = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                return False
            given = user.partition(b":")[2]  # a browser asks for a name as well; with a key, any will do
        by_key = [hmac.compare_digest(given, key) for key in self._keys]
        by_name = [hmac.compare_digest(user, known) for known in self._users]
        return any(by_key) or any(by_name)

    def _bounded(self, receive: Receive) -> Receive:
        """What is received, as long as it is not too much and comes in time."""
        taken, is_whole, deadline = 0, False, time.monotonic() + _SECONDS_FOR_A_BODY

        async def bounded() -> Message:
            nonlocal taken, is_whole
            if is_whole:  # what comes now is that the client goes away, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise TooLargeError from None
            taken += len(message.get("body", b""))
            is_whole = not message.get("more_body")
            if taken > self._limits.body_bytes:
                raise TooLargeError
            return message

        return bounded


def _name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    found = _HOST.fullmatch(host)
    return found[1].lower() if found else ""


def _with_headers(send: Send) -> Send:
    """Add what browsers should know of every answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in there)]
        await send(message)

    return sending


def names_of(host: str) -> tuple[str, ...]:
    """Names under which a server at an address may be asked for, beside those that always work."""
    return () if is_loopback(host) else (f"[{host}]" if ":" in host else host,)
