"""The server process: uvicorn around the application, from the first socket to the last answer."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError
from flagai_altdiff.web.app import make_app
from flagai_altdiff.web.service import Service
from flagai_altdiff.web.settings import Settings

logger = logging.getLogger(__name__)

_LAST_ANSWERS_S = 1.0
_MOST_CONNECTIONS = 1000
_MAX_HEAD_BYTES = 1 << 16


def run_server(settings: Settings, when_ready: Callable[[str], object] = lambda url: None) -> int:
    """Serve until a signal says stop; what was begun then ends within the grace.

    Args:
        settings: Of the server.
        when_ready: Called with its address once it draws.

    Returns:
        The signal that ended it; 0 if none did.

    Raises:
        InvalidRequestError: The address cannot be listened at.
        FlagAIAltDiffError: The first model cannot be had.
    """
    with _listening(settings) as listening:
        return asyncio.run(_serve(settings, listening, when_ready))


async def _serve(settings: Settings, listening: socket.socket, when_ready: Callable[[str], object]) -> int:
    heard = _heard_signals()
    service = Service(settings)
    service.start()  # first, as both this and the page take seconds
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(settings.limits.idle_s),
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        lifespan="on",
        limit_concurrency=_MOST_CONNECTIONS,
        http=functools.partial(_Protocol, idle_s=settings.limits.idle_s),  # type: ignore[arg-type]
    )
    server = _Server(config, service, heard)

    async def tell() -> None:
        try:
            await service.ready()
        except FlagAIAltDiffError:
            server.should_exit = server.force_exit = True
            raise
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        when_ready(f"http://{host}:{listening.getsockname()[1]}")

    telling = asyncio.create_task(tell())
    try:
        if not heard:
            await server.serve(sockets=[listening])
    finally:
        await service.stop()
    if telling.done():
        telling.result()
    telling.cancel()
    return heard[0] if heard else 0


def _heard_signals() -> list[int]:
    """Signals that ask for the end before the server hears them itself, and raise nothing in what runs then."""
    heard, loop = list[int](), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError, RuntimeError):  # on Windows, and in another thread than the main one
            loop.add_signal_handler(number, heard.append, number)
    return heard


class _Protocol(H11Protocol):
    """HTTP that does not wait for ever for the head of a request."""

    def __init__(self, *args: Any, idle_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idle_s = idle_s
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As the original."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """As the original."""
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """As the original."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait_for_head(self) -> None:
        """Close the connection if the head that is due or begun does not come whole in time."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._patience is None:
            self._patience = self.loop.call_later(self._idle_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()


class _Server(uvicorn.Server):
    """Answers until what was begun is done, instead of closing its doors first."""

    def __init__(self, config: uvicorn.Config, service: Service, heard: list[int]) -> None:
        super().__init__(config)
        self._service, self._heard, self._ending = service, heard, asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks, the second one insists; both have done their work then, and are not raised again."""
        self._heard.append(sig)
        if self._ending.is_set():
            self.should_exit = self.force_exit = True
            return
        self._ending.set()
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._end()))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As the original, and the application ends in order although nobody is waited for."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    async def _end(self) -> None:
        logger.info("stopping: what was begun ends within %g s", self._service.settings.limits.grace_s)
        await self._service.stop()
        await asyncio.sleep(_LAST_ANSWERS_S)
        self.should_exit = self.force_exit = True


def _listening(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio sends at once what is to be sent: 40 ms less for a small answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
    except (OSError, OverflowError, UnicodeError) as error:  # no address, no port, no name
        listening.close()
        reason = getattr(error, "strerror", None) or error
        expected = f"{settings.host}:{settings.port} cannot be listened at ({reason}); choose another with --port"
        raise InvalidRequestError("--port", settings.port, expected) from error
    return listening
