"""Records, journals and lists of files as nobody would write them; and any history of a folder between user and hubs.

``ALTDIFF_FUZZ_EXAMPLES=20000`` makes a long run of it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub import (
    fetch,
    hf_cache,
    manifest,
    missing_files,
    plan,
    record_missing,
    sources,
    verify,
)
from flagai_altdiff.hub.disk import Digests
from flagai_altdiff.hub.journal import Journal
from flagai_altdiff.hub.names import JOURNAL_NAME, MANIFEST_NAME, safe_name
from flagai_altdiff.hub.planning import MAX_FILES
from flagai_altdiff.hub.remote import Location, RemoteFile
from flagai_altdiff.model_files import is_fetched, is_tokenizer
from flagai_altdiff.registry import MODELS
from tests.cost import in_proportion
from tests.servers import COMMIT

EXAMPLES = int(os.environ.get("ALTDIFF_FUZZ_EXAMPLES", "60"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
SPEC = replace(MODELS["AltDiffusion-m9"], sources=(("baai", "x"), ("huggingface", "x")))
FLAGAI = ("config.yaml", "model.ckpt", "preprocessor_config.json", "sentencepiece.bpe.model")
DIFFUSERS = (
    "model_index.json",
    "tokenizer/sentencepiece.bpe.model",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


@contextmanager
def priced(size_bytes: int) -> Iterator[None]:
    """``in_proportion`` without the garbage collector, which now and then looks through all that hypothesis keeps."""
    gc.disable()
    try:
        with in_proportion(size_bytes):
            yield
    finally:
        gc.enable()


def fresh(place: Path) -> Path:
    """A new folder for each example, below one of the test."""
    return Path(tempfile.mkdtemp(dir=place)) / SPEC.name


PIECES = st.sampled_from(
    [
        *(
            "..",
            ".",
            "",
            " ",
            "a",
            "A",
            "é",
            "É",
            "e\u0301",
            "\udcff",
            "\ud800",
            "\0",
            "\x1b[2J",
            "con",
            "x" * 300,
            "\uff0e",
        ),
        *("unet", "vae", "UNET", "tokenizer", ".git", "hooks", "model.ckpt", "config.yaml", "a.json", "b.safetensors"),
        *("model.ckpt.part", ".incoming-baai", MANIFEST_NAME, JOURNAL_NAME, "a:b.json", "a\\b", "x.exe", "图.json"),
    ]
)
NAMES = st.one_of(
    st.sampled_from([*FLAGAI, *DIFFUSERS]),
    st.lists(PIECES, min_size=1, max_size=4).map("/".join),
    st.tuples(PIECES, st.integers(1, 3000)).map(lambda pair: f"{pair[0]}/" * pair[1] + "a.json"),
    st.text(max_size=12),
)
NUMBERS = st.one_of(
    st.integers(-2, 3),
    st.sampled_from([1 << 31, 1 << 53, 1 << 60, 1 << 62, 1 << 64, 10**400, 10**4000, -(10**400), True, 1.5, 1e308]),
    st.floats(),
)
ODD = st.recursive(
    st.one_of(st.none(), NUMBERS, NAMES, st.binary(max_size=4).map(lambda data: data.decode("latin-1"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
DIGESTS = st.sampled_from(["0" * 64, "F" * 64, "0" * 63, "", hashlib.sha256(b"{}").hexdigest()])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": NAMES,
    "size_bytes": NUMBERS,
    "sha256": DIGESTS,
    "source": NAMES,
    "url": NAMES,
    "revision": st.sampled_from([COMMIT, "main", "", None]),
    "etag": NAMES,
}
GOOD = {"name": "config.yaml", "size_bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest(), "source": "baai"}
RECORDS = st.one_of(
    st.fixed_dictionaries({}, optional=FIELDS).map(lambda odd: {**GOOD, **odd}),
    st.fixed_dictionaries({}, optional=dict.fromkeys((*FIELDS, "more"), ODD)).map(lambda odd: {**GOOD, **odd}),
    ODD,
)
BOOKS = st.one_of(
    st.builds(
        lambda files, times: {"version": 1, "files": files * times},
        st.lists(RECORDS, max_size=4),
        st.sampled_from([1, 1, 1, 2, 900]),
    ),
    st.fixed_dictionaries({"version": ODD, "files": st.lists(RECORDS, max_size=2) | ODD}),
    ODD,
)
SPOILT = st.sampled_from(
    [
        lambda text: text,
        lambda text: text.replace('"size_bytes": 2', '"size_bytes": ' + "9" * 6000),
        lambda text: text.replace('"size_bytes": 2', '"size_bytes": 1e400'),
        lambda text: text.replace('"name"', '"name": "x", "name"', 1),
        lambda text: text.replace('"version": 1', '"version": 1, "version": 1'),
        lambda text: text[: len(text) // 2],
        lambda text: "\ufeff" + text,
        lambda text: "[" * 50_000 + text,
        lambda text: text + " " * 100_000,
        lambda text: text.replace("{", '{"\\ud800": [[[]]], ', 1),
    ]
)


@pytest.mark.fault(126, 127)
@fuzzed
@given(book=BOOKS, spoil=SPOILT)
@example(book={"version": 1, "files": [GOOD]}, spoil=lambda text: text)
def test_any_record_is_read_or_refused_at_its_price(book: object, spoil: Any, tmp_path: Path) -> None:
    folder = fresh(tmp_path)
    folder.mkdir()
    text = spoil(json.dumps(book))
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8", errors="surrogatepass")
    (folder / "config.yaml").write_bytes(b"{}")
    refused = ""
    with priced(len(text)):
        try:
            records = manifest.read(folder)
            for check in verify(folder, SPEC):
                check.detail.encode()
            record_missing(folder)
        except HubError as error:
            refused = str(error)
        else:
            assert all(str(safe_name(name)) == name for name in records)
            assert manifest.read(folder).keys() >= records.keys()
    assert len(refused) < 1500 and refused.isprintable()
    shutil.rmtree(folder.parent)


@pytest.mark.fault(126, 127)
@fuzzed
@given(
    lines=st.lists(
        ODD | st.fixed_dictionaries({"name": NAMES, "sha256": ODD, "stamp": ODD, "validator": ODD}), max_size=5
    ),
    cut=st.integers(0, 40),
)
def test_any_journal_is_read_at_its_price(lines: list[object], cut: int, tmp_path: Path) -> None:
    folder = fresh(tmp_path)
    folder.mkdir()
    (folder / "a.json").write_bytes(b"{}")
    text = "\n".join(map(json.dumps, lines))
    (folder / JOURNAL_NAME).write_text(text[: len(text) - cut])
    with priced(len(text)):
        journal = Journal(folder, Digests())
        assert journal.get("a.json") is None
        journal.add("a.json", "0" * 64, None)
        assert Journal(folder, Digests()).get("a.json") == journal.get("a.json") is not None
    shutil.rmtree(folder.parent)


@dataclass(kw_only=True)
class DiskHub:
    """A hub whose files lie on this disk."""

    home: Path
    files: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int | None] = field(default_factory=dict)
    hashes: bool = False
    revision: str | None = None
    broken: set[str] = field(default_factory=set)

    def list_files(self, name: str, revision: str | None = None) -> list[RemoteFile]:
        return [self._file(file) for file in {**self.files, **self.sizes}]

    def _file(self, name: str) -> RemoteFile:
        data = self.files.get(name, b"")
        path = self.home / hashlib.sha256(data).hexdigest()
        if not path.exists():
            path.write_bytes(data)
        return RemoteFile(
            name=name,
            locate=lambda: Location(url=path.as_uri()),
            size_bytes=self.sizes.get(name, len(data)),
            sha256=hashlib.sha256(data).hexdigest() if self.hashes else None,
            revision=self.revision,
            copy=self.home / "gone" if name in self.broken else path,
        )


@pytest.fixture
def hubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, DiskHub]:
    made = {"baai": DiskHub(home=tmp_path), "huggingface": DiskHub(home=tmp_path)}
    monkeypatch.setattr(sources, "HUBS", made)
    monkeypatch.setattr(hf_cache, "has", lambda *name: False)
    return made


def listed(names: list[str], sizes: list[object]) -> dict[str, int | None]:
    return {name: size if isinstance(size, int) else None for name, size in zip(names, sizes, strict=False)}


@pytest.mark.fault(126, 127, 128, 129)
@fuzzed
@given(
    names=st.lists(NAMES, max_size=12),
    times=st.sampled_from([1, 1, 1, 300]),
    sizes=st.lists(
        st.sampled_from([None, 0, 1, 1 << 20, 1 << 28, 1 << 30, 1 << 34, 1 << 59]), min_size=12, max_size=12
    ),
    whole=st.booleans(),
)
def test_any_list_is_planned_or_refused_at_its_price(
    names: list[str], times: int, sizes: list[object], whole: bool, tmp_path: Path, hubs: dict[str, DiskHub]
) -> None:
    names = [f"{n or ''}{name}" for n in range(times) for name in names]
    hub = hubs["baai"]
    hub.files = dict.fromkeys(FLAGAI if whole else (), b"x")
    hub.sizes = listed(names, sizes * times)
    folder = fresh(tmp_path)
    with priced(sum(map(len, names))):
        try:
            made = plan(SPEC, folder, source="baai")
        except HubError as error:
            str(error).encode()
        else:
            assert whole and len(made.files) <= MAX_FILES
            assert all(is_fetched(file.name) and str(safe_name(file.name)) == file.name for file in made.files)
            assert made.to_come_bytes <= 4 * SPEC.size_bytes
    assert not folder.exists()
    shutil.rmtree(folder.parent)


HUBS = st.sampled_from(["baai", "baai", "huggingface"])
THERE = st.sampled_from([*FLAGAI, *DIFFUSERS])
ACTS = st.one_of(
    st.tuples(
        st.just("write"), st.one_of(THERE, st.sampled_from(["model.safetensors", "tokenizer.json", "notes.txt"]))
    ),
    st.tuples(st.just("delete"), THERE),
    st.tuples(st.just("plant"), st.one_of(THERE, st.sampled_from(["unet", "tokenizer"]))),
    st.tuples(st.just("lose"), THERE),
    st.tuples(st.just("break"), st.sampled_from(["model.ckpt", "vae/diffusion_pytorch_model.safetensors"])),
)
PUBLISH = st.tuples(st.just("publish"), HUBS, st.sampled_from(["hashes", "commit", "nothing", "nothing"]))
FETCH = st.tuples(st.just("fetch"), st.one_of(HUBS, st.none()), st.booleans())
ROUNDS = st.tuples(
    st.lists(PUBLISH, max_size=2), st.lists(st.one_of(ACTS, st.tuples(st.just("delete"), THERE)), max_size=2), FETCH
)
Step = tuple[Any, ...]


@dataclass(kw_only=True)
class History:
    """A folder between its user, two hubs and fetches."""

    folder: Path
    hubs: dict[str, DiskHub]
    mine: dict[str, bytes | None] = field(default_factory=dict)
    count: int = 0

    def act(self, kind: str, name: str, *rest: Any) -> None:
        """One step of somebody."""
        self.count += 1
        getattr(self, kind)(name, *rest)

    def write(self, name: str) -> None:
        """The user writes a file, or changes one that came."""
        path = self.folder / name
        if not os.path.lexists(path) and not self._way(path):
            return
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.mine[name] = f"mine {self.count:04}".encode()
            path.write_bytes(self.mine[name] or b"")
        elif path.is_file():
            self.mine[name] = path.read_bytes() + b" changed"
            path.write_bytes(self.mine[name] or b"")

    def delete(self, name: str) -> None:
        """The user deletes a file."""
        if (self.folder / name).is_file():
            self.mine.pop(name, None)
            (self.folder / name).unlink()

    def plant(self, name: str) -> None:
        """The user has a pipe there."""
        path = self.folder / name
        if self._way(path) and not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.mkfifo(path)
            self.mine[name] = None

    def publish(self, name: str, identity: str) -> None:
        """A hub has a new version, all its files of one size."""
        hub = self.hubs[name]
        hub.files = {file: f"hub  {self.count:04}".encode() for file in (FLAGAI if name == "baai" else DIFFUSERS)}
        hub.hashes, hub.broken = identity == "hashes", set()
        hub.revision = f"{self.count:040x}" if identity == "commit" else None

    def lose(self, name: str) -> None:
        """No hub has a file any more."""
        for hub in self.hubs.values():
            hub.files.pop(name, None)

    def broken(self, name: str) -> None:
        """A file of the hubs cannot be read."""
        for hub in self.hubs.values():
            hub.broken.add(name)

    def fetch(self, source: str | None, config_only: bool) -> None:
        """A fetch ends well or with an error of ours; whichever, nothing of the user's has changed."""
        before, lacked = self._there(), missing_files(SPEC, self.folder, config_only=config_only)
        try:
            fetch(SPEC, self.folder, source=source, config_only=config_only)
        except HubError:
            pass
        else:
            assert missing_files(SPEC, self.folder, config_only=config_only) == []
            if lacked:
                self._is_one_version(before)
        for name, data in self.mine.items():
            path = self.folder / name
            assert path.is_fifo() if data is None else path.read_bytes() == data, f"{name} of the user's has changed"

    def _is_one_version(self, before: dict[str, bytes]) -> None:
        after = self._there()
        came = {name for name in after if after[name] != before.get(name) and not is_tokenizer(name)}
        if not came:
            return  # at most a tokenizer, beside a model of the user's
        assert len({data for name, data in after.items() if name not in self.mine}) == 1, f"versions are mixed: {after}"
        hub = self.hubs["baai" if came <= set(FLAGAI) else "huggingface"]
        for name in after.keys() & self.mine.keys():
            alike = name in hub.files and len(after[name]) == len(hub.files[name]) and not hub.hashes
            apart = is_tokenizer(name) and not any(map(is_tokenizer, hub.files))
            assert alike or apart, f"{name} of the user's is mixed with a hub's: {after}"

    def _there(self) -> dict[str, bytes]:
        """The files that decide what the model is."""
        names = {*FLAGAI, *DIFFUSERS, "model.safetensors", "tokenizer.json"} - {"preprocessor_config.json"}
        return {name: (self.folder / name).read_bytes() for name in sorted(names) if (self.folder / name).is_file()}

    def _way(self, path: Path) -> bool:
        return path.parent == self.folder or path.parent.is_dir() or not os.path.lexists(path.parent)


@pytest.mark.fault(122, 123)
@fuzzed
@given(rounds=st.lists(ROUNDS, min_size=1, max_size=5))
@example(
    rounds=[([("publish", "baai", "nothing")], [], ("fetch", "baai", config_only)) for config_only in (True, False)]
)
@example(rounds=[([("publish", hub, "nothing")], [], ("fetch", hub, hub == "baai")) for hub in ("baai", "huggingface")])
@example(
    rounds=[
        ([("publish", "baai", "nothing")], [("break", "model.ckpt")], ("fetch", "baai", False)),
        ([("publish", "baai", "nothing")], [], ("fetch", "baai", False)),
    ]
)
@example(rounds=[([("publish", "baai", "hashes")], [("write", "config.yaml")], ("fetch", None, False))])
def test_any_history_keeps_the_users_files_and_one_version(
    rounds: list[tuple[list[Step], list[Step], Step]], tmp_path: Path, hubs: dict[str, DiskHub]
) -> None:
    for hub in hubs.values():
        hub.files, hub.hashes, hub.revision, hub.broken = {}, False, None, set()
    history = History(folder=fresh(tmp_path), hubs=hubs)
    for published, acts, end in rounds:
        for kind, *rest in (*published, *acts, end):
            history.act("broken" if kind == "break" else kind, *rest)
    shutil.rmtree(history.folder.parent)
