"""A loopback server that speaks the protocols of BAAI's hub and of Hugging Face, with faults to order."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

WEIGHTS = (".ckpt", ".bin", ".safetensors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The commit that every branch of every repository is at."""
RESOLVE = re.compile("/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>refs/pr/[0-9]+|[^/]+)/(?P<file>.+)")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How one answer differs from the right one.

    Args:
        status: Instead of the right one.
        body: Instead of the right one; also for a path that does not exist.
        headers: Further ones; ``None`` leaves a header out.
        ignore_range: Send the whole file whatever was asked for.
        cut_at: Close the connection after that many bytes of the body.
        reset: Close it with a reset instead of an end.
        stall_s: Seconds before the answer begins.
        pause_s: Seconds between pieces of the body.
        piece_bytes: Size of those pieces.
        chunked: Send the body in chunks, without its length.
        raw: Sent instead of any answer, status line and headers included.
        endless: Sent again and again after ``raw``, until the other side leaves; ``pause_s`` and ``piece_bytes`` count.
    """

    status: int | None = None
    body: bytes | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    ignore_range: bool = False
    cut_at: int | None = None
    reset: bool = False
    stall_s: float = 0.0
    pause_s: float = 0.0
    piece_bytes: int = 1 << 14
    chunked: bool = False
    raw: bytes | None = None
    endless: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request that the server saw; header names are lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass
class HubServer:
    """What the server has, what it was asked, and which faults it will show.

    Args:
        url: Its base address.
        models: BAAI's hub: model -> file -> content.
        repositories: Hugging Face: owner/name -> path -> content.
        files: Plain files: path (with a leading slash) -> content.
        answer_url: Base of the addresses that BAAI's hub hands out, if not ``url``.
        requests: Every request, in order.
        faults: Path -> faults of the next answers there, used up one by one.
        always: Path -> fault of every further answer there.
    """

    url: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    answer_url: str = ""
    requests: list[Request] = field(default_factory=list)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)

    def model_id(self, model: str) -> str:
        """The id of a model on BAAI's hub."""
        return str(100000 + sorted(self.models).index(model))

    def file_path(self, model: str, file: str) -> str:
        """Path of a file of BAAI's hub."""
        return f"/files/{self.model_id(model)}/{file}"

    def paths(self) -> list[str]:
        """Paths of all requests, in order."""
        return [request.path for request in self.requests]

    def ranges(self, path: str) -> list[str | None]:
        """Range headers of the requests for a path, in order."""
        return [request.headers.get("range") for request in self.requests if request.path == path]

    def next_fault(self, path: str) -> Fault:
        """The fault of the next answer there; one without any effect if none was ordered."""
        queue = self.faults.get(path)
        return queue.pop(0) if queue else self.always.get(path, Fault())

    def answer(self, request: Request) -> tuple[int, bytes, dict[str, str]]:
        """Status, whole body and headers of the right answer."""
        path, model = request.path, request.query.get("model_name", "")
        if path == "/api/searchModleByName":
            return _text(self.model_id(model) if model in self.models else "null")
        if path == "/api/searchModelFileByName":
            return _text(json.dumps(sorted(self.models.get(model, {}))))
        if path == "/api/downloadCode" and request.method == "POST":
            return _text(json.dumps(self._download_code(json.loads(request.body))))
        if path.startswith("/api/models/"):
            return self._tree(path)
        content = self._content(path)
        if content is None:
            return 404, b"Not found", {"Content-Type": "text/plain"}
        headers = {"Content-Type": "application/octet-stream", "ETag": etag(content)}
        if match := RESOLVE.fullmatch(path):
            headers["X-Repo-Commit"] = match["revision"] if len(match["revision"]) == 40 else COMMIT
        return 200, content, headers

    def _download_code(self, question: Mapping[str, str]) -> dict[str, object]:
        model = next((name for name in self.models if self.model_id(name) == question["model_id"]), "")
        files, file = self.models.get(model, {}), question["checkpoint_name"]
        if file not in files:
            return {"code": "40002", "files": sorted(files)}
        return {
            "code": "20000",
            "url": (self.answer_url or self.url) + self.file_path(model, file),
            "size": len(files[file]),
        }

    def _tree(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        repository = path.removeprefix("/api/models/").partition("/tree/")[0]
        if repository not in self.repositories:
            return 404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"}
        entries: list[dict[str, object]] = []
        for name, content in sorted(self.repositories[repository].items()):
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            if name.endswith(WEIGHTS):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
            entries.append(entry)
        folders = sorted({name.split("/")[0] for name in self.repositories[repository] if "/" in name})
        entries += [{"type": "directory", "path": folder, "size": 0, "oid": "1" * 40} for folder in folders]
        return _text(json.dumps(entries))

    def _content(self, path: str) -> bytes | None:
        content = self.files.get(path)
        for model, files in self.models.items():
            for name, data in files.items():
                content = data if path == self.file_path(model, name) else content
        if match := RESOLVE.fullmatch(path):
            content = self.repositories.get(match["repository"], {}).get(match["file"], content)
        return content


def etag(content: bytes) -> str:
    """The ETag that the server gives a file."""
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


@contextmanager
def serve(
    *,
    models: Mapping[str, Mapping[str, bytes]] | None = None,
    repositories: Mapping[str, Mapping[str, bytes]] | None = None,
    files: Mapping[str, bytes] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[HubServer]:
    """Run a server on a free port of 127.0.0.1 until the block ends; arguments as in :class:`HubServer`, and TLS if
    given."""
    hub = HubServer(
        models={name: dict(content) for name, content in (models or {}).items()},
        repositories={name: dict(content) for name, content in (repositories or {}).items()},
        files=dict(files or {}),
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    server.block_on_close = False
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    hub.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve()

        def do_HEAD(self) -> None:
            self._serve()

        def do_CONNECT(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _serve(self) -> None:
            self.close_connection = True
            parts = urlsplit(self.path)
            request = Request(
                method=self.command,
                path=unquote(parts.path),
                query={name: values[0] for name, values in parse_qs(parts.query).items()},
                headers={name.lower(): value for name, value in self.headers.items()},
                body=self.rfile.read(int(self.headers.get("Content-Length", 0))),
            )
            hub.requests.append(request)
            fault = hub.next_fault(request.path)
            time.sleep(fault.stall_s)
            with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
                if fault.raw is not None:
                    self._send_raw(fault.raw, fault)
                else:
                    self._send(*_ranged(request, fault, *hub.answer(request)), fault)

        def _send_raw(self, raw: bytes, fault: Fault) -> None:
            self.wfile.write(raw)
            while fault.endless:
                for start in range(0, len(fault.endless), fault.piece_bytes):
                    self.wfile.write(fault.endless[start : start + fault.piece_bytes])
                    time.sleep(fault.pause_s)

        def _send(self, status: int, body: bytes, headers: Mapping[str, str], fault: Fault) -> None:
            self.send_response(fault.status or status)
            all_headers = {"Content-Length": str(len(body)), "Connection": "close", **headers, **fault.headers}
            if fault.chunked:
                all_headers |= {"Content-Length": None, "Transfer-Encoding": "chunked"}
            for name, value in all_headers.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            body = b"" if self.command == "HEAD" else body[: fault.cut_at]
            for start in range(0, len(body), fault.piece_bytes):
                piece = body[start : start + fault.piece_bytes]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if fault.chunked else piece)
                self.wfile.flush()
                time.sleep(fault.pause_s)
            if fault.reset:
                time.sleep(0.1)  # what was sent arrives before the reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.wfile.close()
                self.connection.close()
            if fault.chunked and fault.cut_at is None:
                self.wfile.write(b"0\r\n\r\n")

    return Handler


def _ranged(
    request: Request, fault: Fault, status: int, body: bytes, headers: dict[str, str]
) -> tuple[int, bytes, dict[str, str]]:
    """Apply the fault's body and the Range and If-Range headers of the request."""
    if fault.body is not None:
        return 200, fault.body, headers
    wanted = request.headers.get("range", "")
    fresh = request.headers.get("if-range") in (None, headers.get("ETag"), fault.headers.get("Last-Modified"))
    if status != 200 or not wanted.startswith("bytes=") or fault.ignore_range or not fresh:
        return status, body, headers
    start = int(wanted.removeprefix("bytes=").split("-")[0])
    if start >= len(body):
        return 416, b"", {"Content-Range": f"bytes */{len(body)}"}
    return 206, body[start:], {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}


def _text(text: str) -> tuple[int, bytes, dict[str, str]]:
    return 200, text.encode(), {"Content-Type": "application/json"}
