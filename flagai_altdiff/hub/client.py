"""One HTTP request: time-outs, redirects, status, bounded retries. What a server sends is data to check, never to run."""

from __future__ import annotations

import email.utils
import functools
import ipaddress
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.auth import HTTPBasicAuth
from requests.utils import get_auth_from_url

from flagai_altdiff.errors import HubError, ModelNotFoundError
from flagai_altdiff.hub.environment import read_timeout_s
from flagai_altdiff.hub.threads import Stop

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
ANSWER_DEADLINE_S = 60.0
"""For a small answer as a whole, however steadily it drips."""
TRIES = 5
UNREACHABLE_TRIES = 2
"""Tries for a server that was never reached: the next source is better than a long wait."""
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
MAX_REDIRECTS = 10
MAX_ANSWER_BYTES = 4 << 20
PIECE_BYTES = 1 << 20
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)


class TransientError(Exception):
    """A failure that may be gone at the next try.

    Args:
        reason: What happened.
        wait_s: How long the server asked to wait, in seconds.
        tries: How often such a failure is tried while nothing has arrived yet.
    """

    def __init__(self, reason: str, *, wait_s: float = 0.0, tries: int | None = None) -> None:
        super().__init__(reason)
        self.wait_s, self.tries = wait_s, TRIES if tries is None else tries


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A small answer of a server.

    Args:
        url: Where it came from.
        text: The body.
        next_url: The next page of a list, if the server named one.
    """

    url: str
    text: str
    next_url: str | None = None

    def parse_json(self) -> object:
        """The body as JSON; HubError with its first line if it is none."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise HubError(f"{shown(self.url)} answered with something that is not JSON: {first_line(self.text)}") from error


def shown(url: str) -> str:
    """``url`` as messages show it: without user, query and fragment, where secrets are."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def first_line(text: str, length: int = 120) -> str:
    """The first line of a server's text, escaped and shortened."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return ascii(line if len(line) <= length else line[: length - 3] + "...")


class _Session(requests.Session):
    """Follows redirects to allowed addresses only, and takes credentials from the caller only, never from a .netrc."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """The address that an answer sends us to; HubError before it is asked if that is not allowed."""
        target = super().get_redirect_target(resp)
        if target is not None:
            new = urljoin(resp.url, target)
            check_scheme(new)
            if resp.url.startswith("https:") and not new.startswith("https:"):
                raise HubError(f"{shown(resp.url)} redirects from https to {shown(new)}; refused.")
        return target

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Leave credentials behind at the host that they are for."""
        if self.should_strip_auth(response.request.url, prepared_request.url):  # type: ignore[no-untyped-call]
            prepared_request.headers.pop("Authorization", None)


def send(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
    body: object = None,
) -> requests.Response:
    """Send one request and return when the headers of its answer are there.

    Proxies and certificates come from the environment. Credentials in ``headers`` follow no redirect to another host, and
    are left out where everybody on the way could read them.

    Args:
        method: ``"GET"``, ``"HEAD"`` or ``"POST"``.
        url: http or https.
        headers: Further headers.
        params: Query.
        body: Sent as JSON, if given.

    Returns:
        The answer with its body unread, whatever its status; to be closed by the caller.

    Raises:
        TransientError: Worth another try.
        HubError: Not worth one.
    """
    check_scheme(url)
    allowed = {"User-Agent": "flagai_altdiff", **(headers or {})}
    if "Authorization" in allowed and not _is_private(url):
        _warn_of_exposure(shown(url).removesuffix(urlsplit(url).path))
        del allowed["Authorization"]
    with _Session() as session, translated(url):
        session.max_redirects = MAX_REDIRECTS
        session.auth = _named_in_address
        return session.request(
            method,
            url,
            headers=allowed,
            params=params,
            json=body,
            stream=True,
            allow_redirects=True,
            timeout=(CONNECT_TIMEOUT_S, read_timeout_s()),
        )


def read_pieces(response: requests.Response) -> Iterator[bytes]:
    """The body as it arrives, in pieces of at most ``PIECE_BYTES``; TransientError or HubError if it breaks off."""
    with translated(response.url):
        while piece := response.raw.read1(PIECE_BYTES, decode_content=True):
            yield piece


def ask(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
    body: object = None,
) -> Answer:
    """Send a question whose answer is small text, with retries; arguments as in :func:`send`."""

    def attempt() -> Answer:
        with send(method, url, headers=headers, params=params, body=body) as response:
            if response.status_code != requests.codes.ok:
                raise refusal(response)
            return Answer(url=url, text=_read_text(response), next_url=response.links.get("next", {}).get("url"))

    return retry(attempt, url)


def ask_headers(url: str, *, headers: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """The headers of an answer, without its body, with retries; arguments as in :func:`send`."""

    def attempt() -> Mapping[str, str]:
        with send("HEAD", url, headers={**(headers or {}), "Accept-Encoding": "identity"}) as response:
            if response.status_code != requests.codes.ok:
                raise refusal(response)
            return response.headers

    return retry(attempt, url)


def retry(attempt: Callable[[], T], url: str, progress: Callable[[], int] = lambda: 0, stop: Stop | None = None) -> T:
    """Call ``attempt`` until it succeeds; failures in a row without new progress are bounded.

    Args:
        attempt: Raises TransientError for a failure worth another try.
        url: For the message.
        progress: How many bytes are there; only a new maximum counts as progress.
        stop: Ends the waiting between tries.

    Raises:
        HubError: Too many failures.
        Stopped: ``stop`` was set.
    """
    stop = stop or Stop()
    failures, most = 0, progress()
    while True:
        try:
            return attempt()
        except TransientError as error:
            failures = 0 if progress() > most else failures + 1
            most = max(most, progress())
            if failures >= (TRIES if most else error.tries):
                raise HubError(f"{shown(url)}: {error} (tried {failures} times).") from error
            wait_s = min(max(error.wait_s, FIRST_WAIT_S * 2 ** max(failures - 1, 0)), LONGEST_WAIT_S)
            logger.info("%s: %s; next try in %.0f s", shown(url), error, wait_s)
        stop.wait(wait_s)


def refusal(response: requests.Response) -> TransientError | HubError:
    """The error that an answer's status stands for."""
    status, where = response.status_code, shown(response.url)
    if status in TRANSIENT_STATUS:
        return TransientError(f"HTTP {status}", wait_s=_retry_after_s(response.headers.get("Retry-After", "")))
    if status in (404, 410) or response.headers.get("X-Error-Code", "").endswith("NotFound"):
        return ModelNotFoundError(f"{where}: HTTP {status}, there is no such model or file.")
    if status in (401, 403, 407):
        return HubError(f"{where}: HTTP {status}, access refused. A gated Hugging Face repository needs HF_TOKEN.")
    return HubError(f"{where}: HTTP {status} {first_line(response.reason or '')}.")


def check_scheme(url: str) -> None:
    """HubError unless ``url`` is http or https and names a host."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        valid = False
    if not valid:
        raise HubError(f"refused the address {url[:200]!a}: only http:// and https:// are fetched.")


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what requests raises into TransientError or HubError."""
    try:
        yield
    except (requests.exceptions.SSLError, urllib3.exceptions.SSLError) as error:
        raise HubError(f"{shown(url)}: the certificate was refused: {_cause(error)}.") from error
    except requests.exceptions.TooManyRedirects as error:
        raise HubError(f"{shown(url)}: more than {MAX_REDIRECTS} redirects.") from error
    except requests.exceptions.ConnectTimeout as error:
        raise TransientError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s", tries=UNREACHABLE_TRIES) from error
    except (requests.exceptions.Timeout, urllib3.exceptions.ReadTimeoutError) as error:
        raise TransientError(f"no data for {read_timeout_s():.0f} s") from error
    except requests.exceptions.ConnectionError as error:
        *_, last = _chain(error)
        if isinstance(last, TimeoutError):
            raise TransientError(f"no data for {read_timeout_s():.0f} s") from error
        tries = TRIES if isinstance(last, ConnectionResetError | BrokenPipeError) else UNREACHABLE_TRIES
        raise TransientError(f"connection failed: {_cause(error)}", tries=tries) from error
    except (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.ProtocolError) as error:
        raise TransientError("the connection was cut") from error
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, UnicodeError, ValueError) as error:
        raise HubError(f"{shown(url)}: {type(error).__name__}; not a usable answer.") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> str:
    *_, last = _chain(error)
    return (last.strerror if isinstance(last, OSError) else None) or type(last).__name__


def _read_text(response: requests.Response) -> str:
    data, until = bytearray(), time.monotonic() + ANSWER_DEADLINE_S
    for piece in read_pieces(response):
        data += piece
        if len(data) > MAX_ANSWER_BYTES:
            raise HubError(f"{shown(response.url)} answered with more than {MAX_ANSWER_BYTES} bytes.")
        if time.monotonic() > until:
            raise TransientError(f"no whole answer within {ANSWER_DEADLINE_S:.0f} s", tries=UNREACHABLE_TRIES)
    with translated(response.url):
        return data.decode("utf-8")


def _named_in_address(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Authorize with ``user:password@`` of the address, if it has them; instead of a .netrc, which requests would read."""
    user, password = get_auth_from_url(request.url or "")
    return HTTPBasicAuth(user, password)(request) if user or password else request


def _is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent there: https, or this machine."""
    parts = urlsplit(url)
    try:
        return parts.scheme == "https" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"


@functools.cache
def _warn_of_exposure(host: str) -> None:
    logger.warning("the token is not sent to %s, because http is not encrypted. Use an https address.", host)


def _retry_after_s(text: str) -> float:
    if text.strip().isdecimal():
        return float(text)
    try:
        until = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return 0.0
    return (until.astimezone(UTC) - datetime.now(UTC)).total_seconds()
