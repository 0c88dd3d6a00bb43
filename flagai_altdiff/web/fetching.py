"""A picture from an address on the web: resolved once, and connected to only where everybody may go."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urljoin, urlsplit

import requests
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NewConnectionError
from urllib3.util.connection import create_connection

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.hub.wire import ExcessError, Meter, MeteredAdapter, TransientError
from flagai_altdiff.pictures import Picture
from flagai_altdiff.web.encoding import picture_from_bytes
from flagai_altdiff.web.settings import Limits

_TIMEOUT_S, _WHOLE_S = 5.0, 20.0
_MAX_REDIRECTS = 3
_CHUNK = 1 << 16
_FETCHERS = ThreadPoolExecutor(8, "picture")
"""Threads that wait for strangers; the server's own work has others."""


async def fetch_picture(url: str, field: str, limits: Limits) -> Picture:
    """Fetch a picture.

    Args:
        url: http or https.
        field: For the error.
        limits: Of its bytes and pixels.

    Raises:
        InvalidRequestError: The address is not public, or there is no picture.
    """
    running = asyncio.get_running_loop()
    content = await running.run_in_executor(_FETCHERS, _content, url, field, limits.body_bytes)
    return await asyncio.to_thread(picture_from_bytes, content, field, limits.picture_pixels)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and no way around a firewall."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast


def _content(url: str, field: str, max_bytes: int) -> bytes:
    meter, most = Meter(_TIMEOUT_S, tries=1), f"at most {max_bytes:,} bytes in {_WHOLE_S:g} s"
    meter.expect("picture", _WHOLE_S)
    try:
        with requests.Session() as session:
            session.trust_env = False  # a proxy would resolve names, and go where we do not
            for scheme in ("http://", "https://"):
                session.mount(scheme, _PublicAdapter(meter))
            for _ in range(_MAX_REDIRECTS + 1):
                if urlsplit(url).scheme not in ("http", "https") or urlsplit(url).username is not None:
                    raise InvalidRequestError(field, url, "expected http:// or https:// without a password")
                with session.get(url, timeout=_TIMEOUT_S, stream=True, allow_redirects=False) as answer:
                    if answer.is_redirect:
                        url = urljoin(url, answer.headers["Location"])
                        meter.next_hop()
                        continue
                    answer.raise_for_status()
                    content = bytearray()
                    for piece in answer.iter_content(_CHUNK):
                        content += piece
                        meter.used(len(piece))
                        if len(content) > max_bytes:
                            raise InvalidRequestError(field, url, most)
                    return bytes(content)
    except (TransientError, ExcessError) as error:
        raise InvalidRequestError(field, url, most) from error
    except (requests.RequestException, ValueError, OSError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        reason = "it leads to an address that is not public" if _PRIVATE in str(error) else "it cannot be fetched"
        raise InvalidRequestError(field, url, f"{reason}; send the picture as base64") from error
    raise InvalidRequestError(field, url, f"more than {_MAX_REDIRECTS} redirects")


_PRIVATE = "the address is not public"


def _connected(connection: HTTPConnection) -> socket.socket:
    """A socket to a host: looked up once, and what is connected to is what was looked at."""
    host = connection._dns_host
    found = socket.getaddrinfo(host, connection.port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise NewConnectionError(connection, _PRIVATE)
    try:
        return create_connection((addresses[0], connection.port or 80), connection.timeout)
    except OSError as error:
        raise NewConnectionError(connection, str(error)) from error


class _PublicHTTP(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _connected(self)


class _PublicHTTPS(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _connected(self)


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _PublicHTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _PublicHTTPS


class _PublicAdapter(MeteredAdapter):
    """Connects to public addresses only, whatever a name resolves to, and reads for as long as the meter lets it."""

    def init_poolmanager(self, *args: int, **options: object) -> None:
        self.poolmanager = PoolManager(num_pools=1)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
