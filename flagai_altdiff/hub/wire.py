"""One connection, metered: what a server may cost in time and in bytes before it gives something of use.

A time-out alone ends at silence; a server that drips headers, repeats ``100 Continue`` or never ends its trailers is
never silent. So every read from the socket is counted here, below the code that understands HTTP.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import time
from typing import Any

from requests.adapters import HTTPAdapter

FRAME_BYTES = 1 << 18
"""Most bytes of status lines, headers, chunk sizes and trailers at once."""
FRAME_SHARE = 16
"""How many bytes of framing each byte of content may bring with it."""


class TransientError(Exception):
    """A failure that may be gone at the next try.

    Args:
        reason: What happened.
        wait_s: How long the server asked to wait, in seconds.
        tries: How often such a failure is tried while nothing has arrived yet, if not as often as others.
    """

    def __init__(self, reason: str, *, wait_s: float = 0.0, tries: int | None = None) -> None:
        super().__init__(reason)
        self.wait_s, self.tries = wait_s, tries


class ExcessError(Exception):
    """A server sends more around the content than any answer needs."""


class Meter:
    """What one answer may still cost.

    Args:
        silence_s: Longest wait for the next byte.
        tries: How often a missed deadline is tried.
    """

    def __init__(self, silence_s: float, tries: int) -> None:
        self._silence_s, self._tries, self._frame = silence_s, tries, FRAME_BYTES
        self.expect("answer", silence_s)

    def expect(self, what: str, within_s: float) -> None:
        """Begin to wait for something of use."""
        self._what, self._within_s, self._until = what, within_s, time.monotonic() + within_s

    def next_hop(self) -> None:
        """Begin with another answer; the time goes on."""
        self._frame = FRAME_BYTES

    def used(self, content_bytes: int) -> None:
        """So much of what arrived was content, not framing."""
        self._frame = min(self._frame + (1 + FRAME_SHARE) * content_bytes, FRAME_BYTES)

    def patience_s(self) -> float:
        """How long the next read may wait.

        Raises:
            TransientError: The time is over.
            ExcessError: There was too much framing.
        """
        if self._frame <= 0:
            raise ExcessError(f"more than {FRAME_BYTES} bytes came around the content; it is no usable answer")
        left = self._until - time.monotonic()
        if left <= 0:
            raise TransientError(f"no {self._what} within {self._within_s:.0f} s", tries=self._tries)
        return min(left, self._silence_s)

    def arrived(self, raw_bytes: int) -> None:
        """So many bytes came from the network."""
        self._frame -= raw_bytes


class MeteredAdapter(HTTPAdapter):
    """Sends requests over connections that are read through a meter."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        super().__init__()

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        """The pool for a request; what it connects to is metered, proxies included."""
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        pool.ConnectionCls = functools.partial(_connect, type(pool).ConnectionCls, self._meter)
        return pool


def _connect(kind: Any, meter: Meter, *args: Any, **options: Any) -> Any:
    connection = kind(*args, **options)
    connection.response_class = functools.partial(_Answer, meter)
    return connection


class _Answer(http.client.HTTPResponse):
    def __init__(self, meter: Meter, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(_Tap(meter, sock), *args, **options)  # type: ignore[arg-type]  # it only makes a file of it

    def begin(self) -> None:
        """Read status and headers; lines that are no headers are dropped, for urllib3 would log the whole address."""
        super().begin()
        self.msg.set_payload("")
        self.msg.defects.clear()


class _Tap(io.RawIOBase):
    """The reading side of a socket; every read asks the meter first."""

    def __init__(self, meter: Meter, sock: socket.socket) -> None:
        self._meter, self._socket = meter, sock
        self._file = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._meter.patience_s())
        try:
            count = self._file.readinto(buffer)
        except TimeoutError:
            self._meter.patience_s()  # says which of the two times is over
            raise
        self._meter.arrived(count or 0)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
