"""The door: hosts, origins, keys, sizes, paths. What a stranger, a web page or a hostile program may not do."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flagai_altdiff.cli import main
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.web import fetching
from flagai_altdiff.web.settings import Limits
from tests.web_server import Server, serving

KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, script_environment: dict[str, str]) -> Iterator[Server]:
    """With a key, a password, a page, and two other addresses that may use it."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "key").write_text(f"{KEY}\n")
    words = ["--api-key", f"@{folder / 'key'}", "--cors", "https://friend.example", "--allow-host", "altdiff.example"]
    environment = {**script_environment, "FLAGAI_ALTDIFF_AUTH": "anna:passwort"}
    with serving(folder, environment, *words, "--max-body", "1") as running:
        running.session.headers["Authorization"] = f"Bearer {KEY}"
        yield running


def raw(server: Server, request: bytes) -> tuple[int, bytes]:
    """The answer to bytes that no client would send."""
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname or "", where.port or 0), 20) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.read()


def bomb(side: int = 30_000) -> bytes:
    """A PNG of 900 million pixels in a megabyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(side * 10)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.fault(56)
@pytest.mark.parametrize("path", ["/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"])
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[1]",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "steps": 1, "none": [1e999]}',
        b'{"prompt": "a", "steps": 1, "none": {"half": "\\ud83d"}}',
        b'{"prompt": "a", "steps": 1, "none": "\xed\xa0\xbd"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": 7}',
        b'"a"',
    ],
)
def test_bad_bodies_are_refused_in_the_words_of_the_interface(server: Server, path: str, body: bytes) -> None:
    answer = server.session.post(server.url + path, data=body, timeout=20)
    said = answer.json()
    if path.startswith("/sdapi") and body == b'{"prompt": 7}':
        assert answer.status_code == 200  # A1111 takes it as a text
        return
    assert answer.status_code == 400
    assert (said["detail"] if path.startswith("/sdapi") else said["error"]["message"]).strip()


WEIGHTED = {"prompt_syntax": "weighted", "steps": 1}


@pytest.mark.fault(61)
@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"prompt": "a BREAK " * 30, **WEIGHTED}, "prompt", "20 chunks of 75 tokens here, and this has 30"),
        ({"prompt": "ein Schloss " * 1000, **WEIGHTED}, "prompt", "20 chunks of 75 tokens"),
        ({"prompt": "ﷺ" * 24_000, **WEIGHTED}, "prompt", "20 chunks"),  # 18 tokens each
        ({"prompt": "a", "negative_prompt": "b BREAK " * 21, **WEIGHTED}, "negative_prompt", "this has 21"),
        ({"prompt": "心" * 24_001}, "prompt", "24,000 characters"),
        ({"prompt": "a", "negative_prompt": " " * 10**6}, "negative_prompt", "24,000 characters"),
    ],
)
def test_prompts_have_a_length(server: Server, body: dict[str, object], field: str, words: str) -> None:
    own = server.post("/api/jobs", body).json()["error"]
    assert own["param"].removesuffix("s") == field and words in own["message"]
    openai = server.post("/v1/images/generations", body)
    assert openai.status_code == 400 and openai.json()["error"]["type"] == "invalid_request_error"
    assert openai.json()["error"]["param"] == field and words in openai.json()["error"]["message"]
    a1111 = server.post("/sdapi/v1/txt2img", {name: body[name] for name in body if name != "prompt_syntax"})
    assert a1111.status_code == 400 and a1111.json()["error"] == "invalid_request"
    assert a1111.json()["detail"].startswith(f"{field}=") and words in a1111.json()["detail"]
    assert len(a1111.text) < 2000


@pytest.mark.fault(61)
def test_chunks_of_a_prompt_count_as_work(server: Server) -> None:
    long = "a castle BREAK " * 19 + "a castle"  # as many as there may be
    done = server.finished(server.submit(long, **WEIGHTED)["id"])
    assert done["state"] == "done"
    much = {"steps": 1000, "images_per_prompt": 121, "width": 128, "height": 128}
    refused = server.post("/api/jobs", {"prompt": long, **WEIGHTED, **much}).json()["error"]
    assert refused["param"] == "images_per_prompt" and "a shorter prompt" in refused["message"]
    job = server.post("/api/jobs", {"prompt": "a castle", **WEIGHTED, **much})
    assert job.status_code == 202
    server.session.delete(f"{server.url}/api/jobs/{job.json()['id']}")
    many = server.post("/api/jobs", {"prompt": ["a" * 20_000] * 13, "steps": 1}).json()["error"]
    assert many["param"] == "prompts" and "240,000 characters" in many["message"]


@pytest.mark.fault(61)
@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"window": 1024, "window_overlap": 1016, "width": 2048, "height": 2048}, "steps", "windows that overlap less"),
        ({"window": 64, "window_overlap": 56, "hires": 8, "width": 512, "height": 512}, "steps", "overlap less"),
        ({"outpaint": "left=9999,top=9999,right=9999,bottom=9999"}, "outpaint", "it has 20006x20006"),
    ],
)
def test_windows_and_margins_count_as_work(server: Server, options: dict[str, object], field: str, words: str) -> None:
    body: dict[str, object] = {"prompt": "a", "steps": 50, "width": 64, "height": 64, **options}
    if "outpaint" in options:
        written = io.BytesIO()
        Image.new("RGB", (8, 8)).save(written, "PNG")
        body["init_image"] = base64.b64encode(written.getvalue()).decode()
    answer = server.post("/api/jobs", body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field and words in answer.json()["error"]["message"]


@pytest.mark.fault(56)
@pytest.mark.parametrize("unit", [" ", "a", "a:", '"', "a, "])
def test_a_text_of_a_picture_costs_no_more_than_its_length(server: Server, unit: str) -> None:
    texts, written = PngInfo(), io.BytesIO()
    texts.add_text("parameters", f"a cat\nSteps: 20, {unit * (900_000 // len(unit))}")
    Image.new("RGB", (8, 8)).save(written, "PNG", pnginfo=texts)
    answer = server.post("/sdapi/v1/png-info", {"image": base64.b64encode(written.getvalue()).decode()})
    assert answer.status_code == 200 and answer.json()["parameters"]["Steps"] == "20"


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    "picture",
    [
        "",
        "no base64!",
        "aGVsbG8=",
        base64.b64encode(bomb()).decode(),
        "data:image/png;base64,AAAA",
        "file:///etc/passwd",
    ],
)
def test_bad_pictures_are_refused(server: Server, picture: str) -> None:
    own = server.post("/api/jobs", {"prompt": "a", "strength": 0.5, "init_image": picture or 7})
    assert own.status_code == 400 and own.json()["error"]["param"] == "init_image"
    a1111 = server.post("/sdapi/v1/img2img", {"prompt": "a", "init_images": [picture]})
    assert a1111.status_code == 400 and a1111.json()["error"] == "invalid_request"


@pytest.mark.fault(56)
def test_large_bodies_are_refused_before_they_are_read(guarded: Server) -> None:
    head = f"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    status, body = raw(guarded, f"{head}Content-Length: 999999999\r\n\r\n".encode())
    assert status == 413 and json.loads(body)["error"]["code"] == "too_large"
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    status, body = raw(guarded, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 17)
    assert status == 413 and json.loads(body)["error"]["code"] == "too_large"


@pytest.mark.fault(57)
def test_no_picture_is_fetched_unless_allowed(server: Server) -> None:
    answer = server.post("/api/jobs", {"prompt": "a", "init_image": "http://example.org/a.png"})
    assert answer.status_code == 400 and "fetches no pictures" in answer.json()["error"]["message"]


@pytest.mark.fault(57)
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "127.1",
        "0.0.0.0",
        "169.254.169.254",
        "10.1.2.3",
        "192.168.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[fe80::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "user@127.0.0.1",
        "100.64.0.1",
        "224.0.0.1",
    ],
)
def test_addresses_that_are_not_public_are_refused(host: str) -> None:
    with pytest.raises(InvalidRequestError, match="init_image"):
        fetching._content(f"http://{host}:9/a.png", "init_image", 1000)


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data")
            self.end_headers()
            return
        if self.path.startswith("/slow"):
            self._drip({"/slow-head": b"X: "}.get(self.path, b"\r\n"))
            return
        self.send_response(200)
        self.end_headers()
        written = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(written, "PNG")
        self.wfile.write(written.getvalue())

    def _drip(self, begin: bytes) -> None:
        """Never silent, for ten seconds."""
        how = b"Transfer-Encoding: chunked" if self.path == "/slow-chunk" else b"Content-Length: 1000"
        with suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + how + b"\r\n" + begin)
            for _ in range(100):
                self.wfile.write(b"0")
                time.sleep(0.1)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.fault(57)
def test_what_is_connected_to_is_what_was_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public the first time and private the second time; a redirect to where nobody may go."""
    pictures = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=pictures.serve_forever, daemon=True).start()
    looked_up = []

    def resolve(host: str, port: int, *args: object, **options: object) -> list[object]:
        looked_up.append(host)
        addresses = {"rebinding.example": ["93.184.216.34", "127.0.0.1"][min(len(looked_up) - 1, 1)]}
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses.get(host, "127.0.0.1"), port))]

    connected = []

    def connect(address: tuple[str, int], *args: object, **options: object) -> socket.socket:
        connected.append(address[0])
        connection = socket.socket()
        connection.connect(("127.0.0.1", address[1]))
        return connection

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetching, "create_connection", connect)
    url = f"http://rebinding.example:{pictures.server_port}"
    try:
        assert fetching._content(f"{url}/a.png", "init_image", 10_000)[:4] == b"\x89PNG"
        assert (looked_up, connected) == (["rebinding.example"], ["93.184.216.34"])
        with pytest.raises(InvalidRequestError, match="not public"):
            fetching._content(f"{url}/a.png", "init_image", 10_000)  # it is 127.0.0.1 now
        looked_up.clear()
        with pytest.raises(InvalidRequestError, match="init_image"):
            fetching._content(f"{url}/away", "init_image", 10_000)
        assert connected == ["93.184.216.34"] * 2
    finally:
        pictures.shutdown()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of pictures on this machine that passes for a public one; a second is all there is."""
    pictures = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=pictures.serve_forever, daemon=True).start()
    public = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: public)

    def connect(address: object, timeout: float) -> socket.socket:
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect(("127.0.0.1", pictures.server_port))
        return connection

    monkeypatch.setattr(fetching, "create_connection", connect)
    monkeypatch.setattr(fetching, "_WHOLE_S", 1.0)
    yield "http://slow.example"
    pictures.shutdown()


@pytest.mark.fault(57)
@pytest.mark.parametrize("path", ["/slow-head", "/slow-body", "/slow-chunk"])
def test_a_picture_that_never_ends_is_waited_for_no_longer_than_the_limit(path: str, slow: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match="bytes in 1 s"):
        fetching._content(slow + path, "init_image", 10_000)
    assert time.monotonic() - began < 5


@pytest.mark.fault(57)
def test_slow_pictures_leave_the_servers_threads_to_others(slow: str) -> None:
    async def others_work() -> bool:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        fetched = asyncio.create_task(fetching.fetch_picture(f"{slow}/slow-body", "init_image", Limits()))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(time.monotonic)
        is_first = not fetched.done()
        with pytest.raises(InvalidRequestError):
            await fetched
        return is_first

    with ThreadPoolExecutor(1) as beside:  # a browser's test may have left this thread a loop
        assert beside.submit(asyncio.run, others_work()).result()


@pytest.mark.fault(58)
@pytest.mark.parametrize("name", ["../AltDiffusion-mini", "/etc", "checkpoints/AltDiffusion-mini", "AltDiffusion-m18"])
def test_only_registered_models_are_found(server: Server, name: str) -> None:
    for path in ("/api/jobs", "/v1/images/generations"):
        answer = server.post(path, {"prompt": "a", "model": name})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    answer = server.post("/sdapi/v1/txt2img", {"prompt": "a", "override_settings": {"sd_model_checkpoint": name}})
    assert answer.status_code == 404
    for option in ("folder", "outpath", "output"):
        assert server.post("/api/jobs", {"prompt": "a", option: "/tmp"}).status_code == 400


@pytest.mark.fault(59)
def test_foreign_pages_and_names_are_refused(guarded: Server) -> None:
    def status(path: str = "/api/models", method: str = "GET", **headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return guarded.session.request(method, guarded.url + path, headers=named, json={}, timeout=20).status_code

    own = urlsplit(guarded.url).netloc
    assert status() == status(Origin=f"http://{own}") == status(Origin="https://friend.example") == 200
    assert status(Host="altdiff.example") == status(Host="localhost:1234") == 200
    assert status(Host="evil.example") == status(Host=f"{own}.evil.example") == status(Host="") == 403
    for origin in ("https://evil.example", "null", f"http://evil.example/{own}"):
        assert status(Origin=origin) == status("/api/jobs", "POST", Origin=origin) == 403
    assert status("/api/jobs", "POST", Sec_Fetch_Site="cross-site") == 403
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert guarded.session.options(guarded.url + "/api/jobs", headers=preflight, timeout=20).status_code == 403
    allowed = guarded.session.options(
        guarded.url + "/api/jobs", headers={**preflight, "Origin": "https://friend.example"}, timeout=20
    )
    assert allowed.headers["access-control-allow-origin"] == "https://friend.example"


@pytest.mark.fault(59)
def test_no_page_is_allowed_unless_named(server: Server) -> None:
    answer = server.get("/api/models", headers={"Origin": "https://friend.example"})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in server.get("/api/models").headers


@pytest.mark.fault(60)
def test_a_key_or_a_password_opens_every_door(guarded: Server) -> None:
    def status(path: str, **headers: str) -> int:
        return guarded.session.get(guarded.url + path, headers={"Authorization": "", **headers}, timeout=20).status_code

    def basic(text: str) -> str:
        return "Basic " + base64.b64encode(text.encode()).decode()

    doors = ("/", "/docs", "/metrics", "/api/models", "/v1/models", "/sdapi/v1/options", "/gradio_api/info")
    for path in doors:
        assert status(path) == 401
    assert status("/healthz") == 200
    for given in (f"Bearer {KEY}", basic(f"anybody:{KEY}"), basic("anna:passwort")):
        assert [status(path, Authorization=given) for path in doors[:-1]] == [200] * 6
    assert status("/v1/models", **{"x-api-key": KEY}) == 200
    wrong = [
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer ",
        "Basic !",
        basic("anna:falsch"),
        basic("anna"),
        basic(":"),
    ]
    for given in wrong:
        assert status("/v1/models", Authorization=given) == 401
    answer = guarded.session.get(guarded.url + "/", headers={"Authorization": ""}, timeout=20)
    assert (
        answer.headers["www-authenticate"].startswith("Basic ") and answer.json()["error"]["code"] == "invalid_api_key"
    )
    assert KEY not in guarded.log and "passwort" not in guarded.log


@pytest.mark.fault(60)
def test_a_public_address_needs_a_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "add --api-key @FILE or --auth @FILE, or --open" in capsys.readouterr().err
    for words, message in (
        (["--api-key", ""], "an empty one would let everybody in"),
        (["--api-key", f"@{tmp_path / 'gone'}"], "cannot be read"),
        (["--auth", "anna"], "with a colon between them"),
        (["--models", "AltDiffusion-m99"], "unknown model"),
        (["--workers", "2", "--devices", "2"], "leave one out"),
        (["--lora", "gone.safetensors"], "no such file"),
        (["--port", "99999", "--no-page"], "choose another with --port"),
        (["--host", f"{'a' * 64}.example", "--open"], "cannot be listened at"),
    ):
        assert main(["serve", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max-work", "--max-body", "--max-memory", "--grace"])
@pytest.mark.parametrize("value", ["inf", "nan", "1e308", "-1"])
def test_limits_are_numbers(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "--no-page", "--port", "99999", f"{flag}={value}"])
    assert exit_.value.code == 2
    assert f"argument {flag}: invalid number from 0 to 1e+15 value: '{value}'" in capsys.readouterr().err


@pytest.mark.fault(63)
@pytest.mark.parametrize(
    "path",
    [
        "/api/history/..%2f..%2fetc%2fpasswd",
        "/api/history/-1",
        "/api/history/00000.png%00",
        "/api/jobs/../../etc/passwd",
        "/api/jobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/api/jobs//etc/passwd/images/0",
        "//etc/passwd",
        "/..%5c..%5cetc",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../key",
        "/gradio_api/file%3d/etc/passwd",
        "/file=/etc/passwd",
        "/static/../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2fetc/passwd",
        "/theme.css%00",
        "/gradio_api/proxy=http://127.0.0.1:1/",
    ],
)
def test_no_path_leads_out(guarded: Server, path: str) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    status, body = raw(guarded, head.encode())
    assert status in (400, 401, 403, 404, 405, 422), body[:200]
    assert b"root:" not in body and KEY.encode() not in body


@pytest.mark.fault(63)
def test_the_pages_files_are_the_images(guarded: Server) -> None:
    job = guarded.finished(guarded.submit()["id"])
    file = guarded.samples / job["images"][0]["file"]
    assert guarded.get(f"/gradio_api/file={file}").status_code == 200
    for other in (
        guarded.folder / "key",
        guarded.folder / "log",
        guarded.samples.parent,
        f"{guarded.samples}/../../key",
    ):
        assert guarded.get(f"/gradio_api/file={other}").status_code in (403, 404)


@pytest.mark.fault(64)
def test_answers_cannot_become_pages(guarded: Server) -> None:
    job = guarded.finished(guarded.submit("<script>alert(1)</script>")["id"])
    picture = guarded.get(job["images"][0]["url"])
    assert picture.headers["content-type"] == "image/png" and "sandbox" in picture.headers["content-security-policy"]
    told = guarded.get(f"/api/jobs/{job['id']}")
    assert told.headers["content-type"] == "application/json" and told.headers["x-content-type-options"] == "nosniff"
    assert io.BytesIO(picture.content).read(4) == b"\x89PNG"
