"""One HTTP request: time-outs, redirects, status, bounded retries. What a server sends is checked, never run."""

from __future__ import annotations

import email.utils
import functools
import json
import logging
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urljoin

import requests
import urllib3
from requests.auth import HTTPBasicAuth
from requests.utils import get_auth_from_url, get_environ_proxies, select_proxy

from flagai_altdiff.errors import HubError, ModelNotFoundError
from flagai_altdiff.hub.addresses import check_url, first_line, is_private, redact_url
from flagai_altdiff.hub.environment import ca_bundle, certificate_advice, check_proxy, proxy_variable, read_timeout_s
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
        headers: Its headers.
        next_url: The next page of a list, if the server named one.
    """

    url: str
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)
    next_url: str | None = None

    def parse_json(self) -> object:
        """The body as JSON; HubError with its first line if it is none."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise self.unusable("JSON") from error

    def unusable(self, expected: str) -> HubError:
        """The error for an answer that is not what was asked for."""
        return HubError(
            f"{redact_url(self.url)} answered with something that is not {expected}: {first_line(self.text)}"
        )


class _Session(requests.Session):
    """Follows redirects to allowed addresses only, and takes credentials from the caller only, never from a .netrc."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Do one hop; the proxy and the certificates in force are checked before, so that an error names them."""
        url = request.url or ""
        if proxy := select_proxy(url, options.get("proxies")):
            check_proxy(proxy)
        if url.startswith("https:"):
            options["verify"] = ca_bundle() or True
        return super().send(request, **options)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """The address that an answer sends us to; HubError before it is asked if that is not allowed."""
        target = super().get_redirect_target(resp)
        if target is not None:
            new = urljoin(resp.url, target)
            check_url(new)
            if resp.url.startswith("https:") and not new.startswith("https:"):
                raise HubError(f"{redact_url(resp.url)} redirects from https to {redact_url(new)}; refused.")
        return target

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Leave credentials behind at the host that they are for."""
        if self.should_strip_auth(response.request.url, prepared_request.url):  # type: ignore[no-untyped-call]
            prepared_request.headers.pop("Authorization", None)


def send(method: str, url: str, *, headers: Mapping[str, str] | None = None, body: object = None) -> requests.Response:
    """Send one request and return when the headers of its answer are there.

    Proxies and certificates come from the environment. Credentials in ``headers`` follow no redirect to another host,
    and are left out where everybody on the way could read them.

    Args:
        method: ``"GET"``, ``"HEAD"`` or ``"POST"``.
        url: http or https.
        headers: Further headers.
        body: Sent as JSON, if given.

    Returns:
        The answer with its body unread, whatever its status; to be closed by the caller.

    Raises:
        TransientError: Worth another try.
        HubError: Not worth one.
    """
    check_url(url)
    allowed = {"User-Agent": "flagai_altdiff", **(headers or {})}
    if "Authorization" in allowed and not is_private(url):
        _warn_of_exposure(redact_url(urljoin(url, "/")))
        del allowed["Authorization"]
    with _Session() as session, translated(url):
        session.max_redirects = MAX_REDIRECTS
        session.auth = _named_in_address
        return session.request(
            method,
            url,
            headers=allowed,
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


def ask(method: str, url: str, *, headers: Mapping[str, str] | None = None, body: object = None) -> Answer:
    """Send a question whose answer is small text, or headers only; with retries. Arguments as in :func:`send`."""
    uncompressed = {"Accept-Encoding": "identity"} if method == "HEAD" else {}  # so that it tells the file's length

    def attempt() -> Answer:
        with send(method, url, headers={**uncompressed, **(headers or {})}, body=body) as response:
            if response.status_code != requests.codes.ok:
                raise refusal(response)
            next_url = response.links.get("next", {}).get("url")
            return Answer(url=url, text=_read_text(response), headers=response.headers, next_url=next_url)

    return retry(attempt, url)


def read_number(headers: Mapping[str, str], name: str) -> int | None:
    """A count of bytes from a header; ``None`` if there is none that can be believed."""
    text = headers.get(name, "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


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
                raise HubError(f"{redact_url(url)}: {error} (tried {failures} times).") from error
            wait_s = min(max(error.wait_s, FIRST_WAIT_S * 2 ** max(failures - 1, 0)), LONGEST_WAIT_S)
            logger.info("%s: %s; next try in %.0f s", redact_url(url), error, wait_s)
        stop.wait(wait_s)


def refusal(response: requests.Response) -> TransientError | HubError:
    """The error that an answer's status stands for."""
    status, where = response.status_code, redact_url(response.url)
    if status in TRANSIENT_STATUS:
        return TransientError(f"HTTP {status}", wait_s=_retry_after_s(response.headers.get("Retry-After", "")))
    if status in (404, 410) or response.headers.get("X-Error-Code", "").endswith("NotFound"):
        return ModelNotFoundError(f"{where}: HTTP {status}, there is no such model or file.")
    if status == requests.codes.proxy_authentication_required:
        return HubError(f"{where}: HTTP {status}, the proxy wants user:password@. {_proxy_to(response.url)}")
    if status in (401, 403):
        return HubError(f"{where}: HTTP {status}, access refused. A gated Hugging Face repository needs HF_TOKEN.")
    return HubError(f"{where}: HTTP {status} {first_line(response.reason or '')}.")


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what requests raises into TransientError or HubError."""
    where = redact_url(url)
    try:
        yield
    except HubError:
        raise
    except (requests.exceptions.SSLError, urllib3.exceptions.SSLError) as error:
        *_, last = _chain(error)
        what = "the certificate was refused" if isinstance(last, ssl.CertificateError) else "no secure connection"
        raise HubError(f"{where}: {what}: {_cause(error)}. {certificate_advice()}") from error
    except requests.exceptions.TooManyRedirects as error:
        raise HubError(f"{where}: more than {MAX_REDIRECTS} redirects.") from error
    except requests.exceptions.ProxyError as error:
        reason = f"the proxy does not connect: {_cause(error)}. {_proxy_to(url)}"
        raise TransientError(reason, tries=UNREACHABLE_TRIES) from error
    except requests.exceptions.ConnectTimeout as error:
        raise TransientError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s", tries=UNREACHABLE_TRIES) from error
    except (requests.exceptions.Timeout, urllib3.exceptions.ReadTimeoutError) as error:
        raise TransientError(f"no data for {read_timeout_s():g} s") from error
    except requests.exceptions.ConnectionError as error:
        *_, last = _chain(error)
        if isinstance(last, TimeoutError):
            raise TransientError(f"no data for {read_timeout_s():g} s") from error
        tries = TRIES if isinstance(last, ConnectionResetError | BrokenPipeError) else UNREACHABLE_TRIES
        raise TransientError(f"connection failed: {_cause(error)}", tries=tries) from error
    except (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.ProtocolError) as error:
        raise TransientError("the connection was cut") from error
    except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:  # requests' other errors are OSErrors
        raise HubError(f"{where}: {type(error).__name__}; not a usable answer.") from error


def _proxy_to(url: str) -> str:
    """What a message says about the proxy in the way, if there is one."""
    proxy = select_proxy(url, get_environ_proxies(url))
    return f"Check or unset {proxy_variable(proxy)}, which is {redact_url(proxy)}." if proxy else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> str:
    *_, last = _chain(error)
    if not isinstance(last, OSError):
        return type(last).__name__
    return f"{last.strerror or first_line(str(last))}{f' ({last.filename!a})' if last.filename else ''}"


def _read_text(response: requests.Response) -> str:
    data, until = bytearray(), time.monotonic() + ANSWER_DEADLINE_S
    for piece in read_pieces(response):
        data += piece
        if len(data) > MAX_ANSWER_BYTES:
            raise HubError(f"{redact_url(response.url)} answered with more than {MAX_ANSWER_BYTES} bytes.")
        if time.monotonic() > until:
            raise TransientError(f"no whole answer within {ANSWER_DEADLINE_S:.0f} s", tries=UNREACHABLE_TRIES)
    with translated(response.url):
        return data.decode("utf-8-sig")


def _named_in_address(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Authorize with ``user:password@`` of the address, if it has them; requests would read a .netrc."""
    user, password = get_auth_from_url(request.url or "")
    return HTTPBasicAuth(user, password)(request) if user or password else request


@functools.cache
def _warn_of_exposure(host: str) -> None:
    logger.warning("the token is not sent to %s, because http is not encrypted. Use an https address.", host)


def _retry_after_s(text: str) -> float:
    if re.fullmatch("[0-9]+", text.strip()):
        return float(text)
    try:
        return (email.utils.parsedate_to_datetime(text).astimezone(UTC) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return 0.0
