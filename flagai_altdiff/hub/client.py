"""One HTTP request: time-outs, redirects, status, bounded retries. What a server sends is checked, never run."""

from __future__ import annotations

import base64
import email.utils
import functools
import http.client
import json
import logging
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urljoin

import requests
import urllib3
from requests.utils import get_auth_from_url, get_environ_proxies, requote_uri, select_proxy

from flagai_altdiff.errors import HubError, ModelNotFoundError, shown
from flagai_altdiff.hub.addresses import WEB, check_url, first_line, is_private, redact_url
from flagai_altdiff.hub.environment import (
    READ_TIMEOUT_S,
    ca_bundle,
    certificate_advice,
    check_proxy,
    proxy_variable,
    read_timeout_s,
)
from flagai_altdiff.hub.threads import Stop
from flagai_altdiff.hub.wire import ExcessError, Meter, MeteredAdapter, TransientError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
ANSWER_DEADLINE_S = 60.0
"""For a small answer as a whole, for the beginning of a file, and for each further piece of it, however steadily it
drips."""
TRIES = 5
UNREACHABLE_TRIES = 2
"""Tries for a server that was never reached: the next source is better than a long wait."""
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
MAX_REDIRECTS = 10
REDIRECTS = (301, 302, 303, 307, 308)
MAX_ANSWER_BYTES = 4 << 20
PIECE_BYTES = 1 << 20
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A small answer of a server.

    Args:
        url: Where it came from.
        text: The body.
        headers: Its headers.
        size_bytes: The announced size of the body, also where only headers were asked for.
        next_url: The next page of a list, if the server named one.
    """

    url: str
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int | None = None
    next_url: str | None = None

    def parse_json(self) -> object:
        """The body as JSON; HubError with its first line if it is none."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            raise self.unusable("JSON") from None

    def unusable(self, expected: str) -> HubError:
        """The error for an answer that is not what was asked for."""
        return HubError(
            f"{redact_url(self.url)} answered with something that is not {expected}: {first_line(self.text)}"
        )


class Reply:
    """The answer to one request, with its body unread; to be closed.

    Args:
        response: Status and headers.
        meter: What reading the body may still cost.
    """

    def __init__(self, response: requests.Response, meter: Meter) -> None:
        self._response, self._meter = response, meter
        self.url, self.status, self.reason = response.url, response.status_code, response.reason or ""
        self.headers: Mapping[str, str] = response.headers

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave; what was not read never is."""
        self._response.close()

    def shutdown(self) -> None:
        """End a read that waits in another thread."""
        self._response.raw.shutdown()

    @property
    def next_url(self) -> str | None:
        """The next page of a list, if the server names one."""
        return self._response.links.get("next", {}).get("url")

    def size(self) -> int | None:
        """The announced size of the body.

        Raises:
            HubError: The body comes in a form that was not asked for, or its size is no number.
        """
        where = redact_url(self.url)
        for header, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
            form = self.headers.get(header, "").strip()
            if form.lower() not in ("", "identity", plain):
                told = f"{header}: {shown(form, 40)}"
                raise HubError(f"{where}: the server compresses what it sends although it was asked not to ({told}).")
        sizes = {text.strip() for text in self.headers.get("Content-Length", "").split(",")}
        text = next(iter(sizes))
        if len(sizes) > 1 or not re.fullmatch("[0-9]{0,18}", text):
            raise HubError(f"{where} announces a size that is none, {shown(self.headers['Content-Length'], 40)}.")
        return int(text) if text else None

    def pieces(self) -> Iterator[bytes]:
        """The body of a file as it arrives, in pieces of at most ``PIECE_BYTES``; it may take long, a piece may not.

        Raises:
            TransientError: It breaks off.
            HubError: It is no usable answer.
        """
        while True:
            self._meter.expect("further piece", deadline_s())
            if not (piece := self._read()):
                return
            yield piece

    def text(self) -> str:
        """The body of a small answer, under the deadline of its request; errors as of :meth:`pieces`."""
        data = bytearray()
        while piece := self._read():
            data += piece
            if len(data) > MAX_ANSWER_BYTES:
                raise HubError(f"{redact_url(self.url)} answered with more than {MAX_ANSWER_BYTES} bytes.")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise HubError(f"{redact_url(self.url)} answered with something that is not UTF-8 text.") from None

    def _read(self) -> bytes:
        with translated(self.url):
            piece = self._response.raw.read1(PIECE_BYTES, decode_content=False)
        self._meter.used(len(piece))
        return bytes(piece)


class _Session(requests.Session):
    """Follows no redirect by itself, for it would read their bodies; takes no credentials from a .netrc."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.auth = lambda request: request
        for scheme in WEB:
            self.mount(f"{scheme}://", MeteredAdapter(meter))

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Do one hop; the proxy and the certificates in force are checked before, so that an error names them."""
        url = request.url or ""
        if proxy := select_proxy(url, options.get("proxies")):
            check_proxy(proxy)
        if url.startswith("https:"):
            options["verify"] = ca_bundle() or True
        return super().send(request, **options)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None, whatever the answer."""
        return None


def send(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: object = None,
    what: str = "beginning of an answer",
) -> Reply:
    """Send one request and return when the headers of its answer are there.

    Redirects are followed; their bodies are not read. Proxies and certificates come from the environment. Credentials
    in ``headers`` and in ``url`` follow no redirect to another host, and those in ``headers`` are left out where
    everybody on the way could read them.

    Args:
        method: ``"GET"``, ``"HEAD"`` or ``"POST"``.
        url: http or https.
        headers: Further headers.
        body: Sent as JSON, if given.
        what: What must be there before the deadline, for the message.

    Returns:
        The answer, whatever its status; to be closed by the caller.

    Raises:
        TransientError: Worth another try.
        HubError: Not worth one.
    """
    check_url(url)
    sent = {"User-Agent": "flagai_altdiff", "Accept-Encoding": "identity", **(headers or {})}
    if "Authorization" in sent and not is_private(url):
        _warn_of_exposure(redact_url(urljoin(url, "/")))
        del sent["Authorization"]
    sent |= _credentials(url)
    meter = Meter(read_timeout_s(), UNREACHABLE_TRIES)
    meter.expect(what, deadline_s())
    start = url
    with _Session(meter) as session:
        for _ in range(MAX_REDIRECTS + 1):
            reply = _hop(session, meter, method, url, sent, body)
            target = _redirect_target(reply)
            if target is None:
                return reply
            reply.close()
            if session.should_strip_auth(reply.url, target):  # type: ignore[no-untyped-call]
                sent.pop("Authorization", None)
            if reply.status == requests.codes.see_other or (method == "POST" and reply.status < 307):
                method, body = ("HEAD" if method == "HEAD" else "GET"), None
            url = target
    raise HubError(f"{redact_url(start)}: more than {MAX_REDIRECTS} redirects.")


def _hop(session: _Session, meter: Meter, method: str, url: str, headers: Mapping[str, str], body: object) -> Reply:
    meter.next_hop()
    timeout = (CONNECT_TIMEOUT_S, read_timeout_s())
    with translated(url):
        return Reply(session.request(method, url, headers=headers, json=body, stream=True, timeout=timeout), meter)


def _redirect_target(reply: Reply) -> str | None:
    """The address that an answer sends us to; HubError, before it is asked, if that is not allowed."""
    location = reply.headers.get("Location")
    if location is None or reply.status not in REDIRECTS:
        return None
    where = redact_url(reply.url)
    try:
        target = requote_uri(urljoin(reply.url, location.encode("latin-1").decode("utf-8")))
    except ValueError:
        raise HubError(f"{where} redirects to what is no address.") from None
    check_url(target)
    if reply.url.startswith("https:") and not target.startswith("https:"):
        raise HubError(f"{where} redirects from https to {redact_url(target)}; refused.")
    return target


def deadline_s() -> float:
    """Seconds within which something of use must come, longer for users who chose to be patient with silence."""
    return ANSWER_DEADLINE_S * max(1.0, read_timeout_s() / READ_TIMEOUT_S)


def ask(method: str, url: str, *, headers: Mapping[str, str] | None = None, body: object = None) -> Answer:
    """Send a question whose answer is small text, or headers only; with retries. Arguments as in :func:`send`."""

    def attempt() -> Answer:
        with send(method, url, headers=headers, body=body, what="whole answer") as reply:
            if reply.status != requests.codes.ok:
                raise refusal(reply)
            size = reply.size()
            return Answer(url=url, text=reply.text(), headers=reply.headers, size_bytes=size, next_url=reply.next_url)

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
            if failures >= (error.tries if error.tries and not most else TRIES):
                raise HubError(f"{redact_url(url)}: {error} (tried {failures} times).") from error
            wait_s = min(max(error.wait_s, FIRST_WAIT_S * 2 ** max(failures - 1, 0)), LONGEST_WAIT_S)
            logger.info("%s: %s; next try in %.0f s", redact_url(url), error, wait_s)
        stop.wait(wait_s)


def refusal(reply: Reply) -> TransientError | HubError:
    """The error that an answer's status stands for."""
    status, where = reply.status, redact_url(reply.url)
    if status in TRANSIENT_STATUS:
        return TransientError(f"HTTP {status}", wait_s=_retry_after_s(reply.headers.get("Retry-After", "")))
    if status in (404, 410) or reply.headers.get("X-Error-Code", "").endswith("NotFound"):
        return ModelNotFoundError(f"{where}: HTTP {status}, there is no such model or file.")
    if status == requests.codes.proxy_authentication_required:
        return HubError(f"{where}: HTTP {status}, the proxy wants user:password@. {_proxy_to(reply.url)}")
    if status in (401, 403):
        return HubError(f"{where}: HTTP {status}, access refused. A gated Hugging Face repository needs HF_TOKEN.")
    return HubError(f"{where}: HTTP {status} {first_line(reply.reason)}.")


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what requests raises into TransientError or HubError; without its cause, which has the whole address."""
    try:
        yield
    except (HubError, TransientError):
        raise
    except Exception as error:
        raise _translation(error, url) from None


def _translation(error: Exception, url: str) -> TransientError | HubError:
    where, silence = redact_url(url), f"no data for {read_timeout_s():g} s"
    causes = list(_chain(error))
    last = next((one for one in causes if isinstance(one, http.client.HTTPException)), causes[-1])
    match error:
        case ExcessError():
            return HubError(f"{where}: {error}.")
        case requests.exceptions.SSLError() | urllib3.exceptions.SSLError():
            what = "the certificate was refused" if isinstance(last, ssl.CertificateError) else "no secure connection"
            return HubError(f"{where}: {what}: {_cause(last)}. {certificate_advice()}")
        case requests.exceptions.ProxyError():
            reason = f"the proxy does not connect: {_cause(last)}. {_proxy_to(url)}"
            return TransientError(reason, tries=UNREACHABLE_TRIES)
        case requests.exceptions.ConnectTimeout():
            return TransientError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s", tries=UNREACHABLE_TRIES)
        case requests.exceptions.Timeout() | urllib3.exceptions.ReadTimeoutError():
            return TransientError(silence)
        case requests.exceptions.ConnectionError():
            if isinstance(last, TimeoutError):
                return TransientError(silence)
            lost = isinstance(last, ConnectionResetError | BrokenPipeError)
            return TransientError(f"connection failed: {_cause(last)}", tries=None if lost else UNREACHABLE_TRIES)
        case requests.exceptions.ChunkedEncodingError() | urllib3.exceptions.ProtocolError():
            return TransientError("the connection was cut")
    return HubError(f"{where}: {type(error).__name__}; not a usable answer.")


def _proxy_to(url: str) -> str:
    """What a message says about the proxy in the way, if there is one."""
    proxy = select_proxy(url, get_environ_proxies(url))
    return f"Check or unset {proxy_variable(proxy)}, which is {redact_url(proxy)}." if proxy else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(last: BaseException) -> str:
    if isinstance(last, http.client.HTTPException) and not isinstance(last, OSError):
        return f"what came is no answer of a web server ({type(last).__name__})"
    if not isinstance(last, OSError):
        return type(last).__name__
    return f"{last.strerror or first_line(str(last))}{f' ({last.filename!a})' if last.filename else ''}"


def _credentials(url: str) -> dict[str, str]:
    """What authorizes with ``user:password@`` of an address, if it has them."""
    user, password = get_auth_from_url(url)
    if not (user or password):
        return {}
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


@functools.cache
def _warn_of_exposure(host: str) -> None:
    logger.warning("the token is not sent to %s, because http is not encrypted. Use an https address.", host)


def _retry_after_s(text: str) -> float:
    """Seconds to wait, as a number or a date says it; 0 if it is neither."""
    text = text.strip()[:60]
    if re.fullmatch("[0-9]+", text):
        return float(text)
    try:
        return (email.utils.parsedate_to_datetime(text).astimezone(UTC) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError, OverflowError, IndexError):
        return 0.0
