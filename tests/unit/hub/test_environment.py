"""Settings of the machine that are wrong, or no text: each is named, none shows a secret, other sources go on."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest

from flagai_altdiff.errors import HubError, HubUnavailableError, OfflineError
from flagai_altdiff.hub import environment, fetch, hf_cache
from flagai_altdiff.hub.addresses import redact_url
from flagai_altdiff.hub.client import ask
from flagai_altdiff.registry import MODELS, FileSpec, ModelSpec
from tests.servers import COMMIT, Fault, HubServer, serve

SPEC = MODELS["AltDiffusion"]
PINNED = MODELS["AltDiffusion-m18"]
FLAGAI = {"config.yaml": b"model: {}", "model.ckpt": bytes(5_000), "sentencepiece.bpe.model": b"pieces"}
DIFFUSERS = {
    "model_index.json": b"{}",
    "text_encoder/config.json": b"{}",
    "unet/config.json": b"{}",
    "vae/config.json": b"{}",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/sentencepiece.bpe.model": b"{}",
    "text_encoder/pytorch_model.bin": b"text",
    "unet/diffusion_pytorch_model.bin": b"unet",
    "vae/diffusion_pytorch_model.bin": b"vae",
}
BYTES = os.fsdecode(b"\xff\xfe")
"""What the environment gives for bytes that are no text."""
ENDPOINTS = ("FLAGAI_ALTDIFF_BAAI_ENDPOINT", "HF_ENDPOINT", "FLAGAI_ALTDIFF_MIRROR")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / SPEC.name


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A server that is BAAI's hub, Hugging Face and a mirror."""
    with serve(
        models={SPEC.name: FLAGAI},
        repositories={f"BAAI/{SPEC.name}": DIFFUSERS},
        files={f"/models/{SPEC.name}/{name}": data for name, data in FLAGAI.items()},
    ) as running:
        yield running


def assert_printable(text: str) -> None:
    text.encode()
    assert all(char.isprintable() or char == "\n" for char in text)


WRONG = {
    "no scheme": "hf-mirror.example",
    "no scheme, with a secret": "me:secret@hf-mirror.example",
    "a space": "https://hf mirror.example",
    "a space, with a secret": "https://me:sec ret-secret@hf-mirror.example",
    "quotes": '"https://hf-mirror.example"',
    "single quotes": "'https://hf-mirror.example'",
    "typographic quotes": "https://hf-mirror.example\u201d",
    "one quote": 'https://me:secret@hf-mirror.example"',
    "another scheme": "ftp://me:secret@hf-mirror.example",
    "a file": "file:///etc/passwd",
    "a scheme only": "https://",
    "one slash": "https:/hf-mirror.example",
    "a port that is none": "https://me:secret@hf-mirror.example:port",
    "a port beyond all": "https://hf-mirror.example:99999999",
    "half an address of version 6": "https://me:secret@[::1",
    "a slash in the password": "https://me:se/secret@hf-mirror.example",
    "a slash in a password of digits": "https://me:12/secret@hf-mirror.example",
    "a question mark in the password": "https://me:12?secret@hf-mirror.example",
    "a line break": "https://hf-mirror.example\nx",
    "an escape": "https://hf-mirror.example/\x1b[31m",
    "bytes": f"https://hf-mirror.example/{BYTES}",
    "bytes only": BYTES,
}


@pytest.mark.fault(101)
@pytest.mark.parametrize("value", WRONG.values(), ids=list(WRONG))
@pytest.mark.parametrize("variable", ENDPOINTS)
def test_a_wrong_address_is_named_and_the_others_are_asked(
    hub: HubServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    value: str,
) -> None:
    for name in ENDPOINTS[:2]:
        monkeypatch.setenv(name, hub.url)
    monkeypatch.setenv(variable, value)
    wrong_first = SPEC.sources if variable != "HF_ENDPOINT" else SPEC.sources[::-1]
    fetch(replace(SPEC, sources=wrong_first), folder)
    (line,) = [record.getMessage() for record in caplog.records if "is unavailable from" in record.getMessage()]
    assert f"{variable} is " in line and "set or unset it" in line
    for secret in ("secret", "me:", "12"):
        assert secret not in line.partition(f"{variable} is ")[2]
    assert_printable(line)


@pytest.mark.fault(101)
def test_when_nothing_is_left_the_settings_in_force_are_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", "model.baai.ac.cn")
    with pytest.raises(HubUnavailableError) as caught:
        fetch(SPEC, folder)
    text = str(caught.value)
    assert "FLAGAI_ALTDIFF_BAAI_ENDPOINT is 'model.baai.ac.cn'" in text and "secret" not in text
    assert "check or unset FLAGAI_ALTDIFF_BAAI_ENDPOINT, HF_ENDPOINT" in text
    assert caught.value.errno is None


@pytest.mark.parametrize("variable", ENDPOINTS)
@pytest.mark.parametrize("form", ["{url}", " {url}/ ", "{url}//", "{credentials}"])
def test_right_addresses_are_taken(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, form: str
) -> None:
    url = hub.url + ("/models" if variable == "FLAGAI_ALTDIFF_MIRROR" else "")
    monkeypatch.setenv(variable, form.format(url=url, credentials=url.replace("://", "://me:p%40ss@")))
    fetch(SPEC, folder)
    assert not any("//" in path for path in hub.paths())


@pytest.mark.parametrize("path", ["/模型", "/it's", "/a%20b"])
def test_a_path_may_have_any_letters(folder: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    with serve(files={f"{unquote(path)}/{name}": data for name, data in FLAGAI.items()}) as server:
        monkeypatch.setenv("FLAGAI_ALTDIFF_MIRROR", server.url + path)
        fetch(SPEC, folder)
    assert (folder / "model.ckpt").is_file()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://me:secret@h.example:80/a/b?token=secret#secret", "https://h.example:80/a/b"),
        ("https://cdn.example/gh/me/models@main/x", "https://cdn.example/gh/me/models@main/x"),
        ("me:secret@h.example/a?secret", "h.example/a"),
        ("https://me:sec/ret?x@h.example", "h.example"),
        ("http://[::1", "http://[::1"),
        (f"https://h.example/{BYTES}\n", "https://h.example/\\udcff\\udcfe"),
        ("", ""),
    ],
)
def test_what_messages_show_of_an_address(url: str, text: str) -> None:
    assert redact_url(url) == text


def bundle(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bundle.pem"
    match kind:
        case "missing":
            return tmp_path / BYTES / "bundle.pem"
        case "empty":
            path.write_bytes(b"")
        case "no certificates":
            path.write_bytes(b"\xff\x00 certificates")
        case "half a certificate":
            path.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n")
    return path


@pytest.mark.fault(102)
@pytest.mark.parametrize("variable", environment.CERTIFICATE_VARIABLES)
@pytest.mark.parametrize("kind", ["missing", "empty", "no certificates", "half a certificate"])
def test_certificates_that_cannot_be_read_are_named_and_others_are_asked(
    hub: HubServer,
    secure: HubServer,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    kind: str,
) -> None:
    monkeypatch.setenv(variable, str(bundle(tmp_path, kind)))
    with pytest.raises(HubError, match=rf"{variable} names '.*'.*PEM format, or unset it") as caught:
        ask("GET", secure.url + "/answer")
    assert caught.value.errno is None
    assert_printable(str(caught.value))
    monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", secure.url)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    fetch(SPEC, folder)
    assert (folder / "model_index.json").is_file() and secure.requests == []
    assert f"is unavailable from baai: {variable} names" in caplog.text


@pytest.mark.parametrize("variable", environment.CERTIFICATE_VARIABLES)
def test_certificates_of_the_users_own_are_trusted(
    secure: HubServer, certificate: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(certificate))
    assert ask("GET", secure.url + "/answer").text == "[]"


@pytest.mark.fault(102)
def test_a_refused_certificate_says_which_are_trusted(
    secure: HubServer, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match=r"certificate was refused: .*name the file with its own in REQUESTS_CA_BUNDLE"):
        ask("GET", secure.url + "/answer")
    monkeypatch.setenv("CURL_CA_BUNDLE", str(tmp_path))  # a folder without certificates
    with pytest.raises(HubError, match=r"certificate was refused: .*the certificates that CURL_CA_BUNDLE names"):
        ask("GET", secure.url + "/answer")
    monkeypatch.delenv("CURL_CA_BUNDLE")
    with pytest.raises(HubError, match="no secure connection"):
        ask("GET", hub.url.replace("http:", "https:") + "/answer")


PROXIES = {
    "socks": ("socks5://me:secret@127.0.0.1:1080", "SOCKS proxy.*pip install"),
    "socks with names": ("SOCKS5H://127.0.0.1:1080", "SOCKS proxy.*pip install"),
    "a scheme of no proxy": ("socks://127.0.0.1:1080", "does not begin with"),
    "a misspelt scheme": ("htp://me:secret@127.0.0.1:3128", "does not begin with"),
    "half an address of version 6": ("http://me:secret@[::1", "cannot be understood"),
    "a port that is none": ("http://127.0.0.1:http", "cannot be understood"),
    "a port beyond all": ("127.0.0.1:99999", "cannot be understood"),
    "a space": ("http://me:secret @127.0.0.1:3128", "spaces"),
    "quotes": ("'http://127.0.0.1:3128'", "quotes|begin with"),
    "bytes": (f"http://{BYTES}:3128", "other characters"),
    "no server": ("http://:3128", "names no server"),
}


@pytest.mark.fault(103)
@pytest.mark.parametrize("kind", PROXIES)
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_a_proxy_that_cannot_be_used_is_named_and_others_are_asked(
    hub: HubServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    kind: str,
) -> None:
    value, words = PROXIES[kind]
    monkeypatch.setenv(variable, value)
    with pytest.raises(HubError, match=f"{variable} .*({words})") as caught:
        ask("GET", "http://hub.example/answer")
    assert "secret" not in str(caught.value) and "unset it" in str(caught.value)
    assert_printable(str(caught.value))
    monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    fetch(SPEC, folder)
    assert (folder / "model_index.json").is_file()
    assert f"is unavailable from baai: {variable} " in caplog.text


@pytest.mark.fault(103)
def test_a_proxy_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://me:secret@127.0.0.1:9")
    for scheme in ("http", "https"):
        with pytest.raises(
            HubError, match=r"Connection refused\. Check or unset ALL_PROXY, .* http://127\.0\.0\.1:9"
        ) as caught:
            ask("GET", f"{scheme}://hub.example/answer")
        assert "secret" not in str(caught.value)


@pytest.mark.fault(103)
def test_a_proxy_that_wants_a_password_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.always["/answer"] = hub.always["http://hub.example/answer"] = Fault(status=407)
    monkeypatch.setenv("http_proxy", hub.url)
    with pytest.raises(HubError, match=r"HTTP 407, the proxy wants .*http_proxy"):
        ask("GET", "http://hub.example/answer")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.fault(104)
@pytest.mark.parametrize("spec", [SPEC, PINNED], ids=lambda spec: spec.name)
@pytest.mark.parametrize("variable", environment.CACHE_VARIABLES)
@pytest.mark.parametrize("value", ["~nobody-of-that-name/x", "/dev/null", BYTES, "relative", "/proc/1/mem", "x" * 5000])
def test_a_cache_that_is_none_is_done_without(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, spec: ModelSpec
) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv(variable, value)
    hub.models[spec.name] = FLAGAI
    hub.repositories[f"BAAI/{spec.name}"] = DIFFUSERS
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    fetch(spec, folder)
    assert (folder / "model_index.json").is_file()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE=1") as caught:
        fetch(spec, folder.with_name("other"))
    assert_printable(str(caught.value))


@pytest.mark.fault(104)
def test_a_cache_that_may_not_be_read_is_done_without(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[f"BAAI/{PINNED.name}"] = DIFFUSERS
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with tempfile.TemporaryDirectory() as place:
        cache, own = Path(place) / "cache", Path(place) / "own"
        cache.mkdir(mode=0o000)
        own.mkdir()
        os.chmod(place, 0o755)
        os.chmod(own, 0o777)
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        with as_nobody():
            fetch(PINNED, own / "model")
        assert (own / "model" / "model_index.json").is_file()


@pytest.mark.fault(104)
@pytest.mark.parametrize("refs", [b"\xff\xfe", b"../../x", b"", b"0" * 100_000])
def test_a_reference_that_is_none_is_done_without(refs: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--a--b" / "refs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs" / "main").write_bytes(refs)
    assert not hf_cache.has("a/b")


@pytest.mark.fault(104)
def test_a_cached_file_that_cannot_be_read_is_downloaded(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Reading fails in the midst, as a bad disk does it; it is no error of the disk that the model goes to."""
    snapshot = tmp_path / f"models--BAAI--{SPEC.name}" / "snapshots" / COMMIT
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet" / "diffusion_pytorch_model.bin").symlink_to("/proc/self/mem")
    hub.repositories[f"BAAI/{SPEC.name}"] = {**DIFFUSERS, "unet/diffusion_pytorch_model.bin": b""}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    fetch(replace(SPEC, files=(FileSpec(name="model_index.json"),)), folder)
    assert "Input/output error. It is downloaded instead" in caplog.text


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert not hf_cache.has("a/b")


@pytest.mark.fault(105)
@pytest.mark.parametrize(
    "value", ["30s", "-1", "1e9", "\u0663", "inf", "nan", "9" * 400, "0", "0.0", "1,5", BYTES, "1_0"]
)
def test_a_time_that_is_none_is_named_once(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment._warn_of_timeout.cache_clear()
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", value)
    assert [environment.read_timeout_s() for _ in range(3)] == [30.0] * 3
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("HF_HUB_DOWNLOAD_TIMEOUT=") and "30 are used" in line
    assert_printable(line)


@pytest.mark.parametrize(("value", "seconds"), [("10", 10.0), (" 2.5 ", 2.5), ("", 30.0), ("86400", 86_400.0)])
def test_a_time_may_have_a_fraction(value: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", value)
    assert environment.read_timeout_s() == seconds


@pytest.mark.fault(105)
@pytest.mark.parametrize("token", [BYTES, f"hf_{BYTES}", "hf_\u200b", "hf_a\x1bb", '"hf_a b"'])
def test_an_odd_token_ends_hugging_face_only(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", hub.url)
    fetch(replace(SPEC, sources=SPEC.sources[::-1]), folder)
    assert (folder / "config.yaml").is_file()
    assert "HF_TOKEN has spaces or other characters" in caplog.text and "hf_" not in caplog.text


@pytest.mark.parametrize("name", environment.OFFLINE_VARIABLES)
def test_a_switch_of_bytes_is_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, BYTES)
    assert environment.offline_switch() is None
