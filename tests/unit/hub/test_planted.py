"""Links, pipes, folders and second names where files are written or read; names, numbers and records made to hurt."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from flagai_altdiff.errors import FilesInTheWayError, HubError, HubUnavailableError, ModelNotFoundError
from flagai_altdiff.files import open_regular
from flagai_altdiff.hub import (
    disk,
    fetch,
    fetching,
    journal,
    manifest,
    missing_files,
    plan,
    planning,
    record_missing,
    threads,
    verify,
)
from flagai_altdiff.hub.disk import Digests
from flagai_altdiff.hub.journal import Journal
from flagai_altdiff.hub.lock import folder_lock
from flagai_altdiff.hub.names import JOURNAL_NAME, LOCK_NAME, MANIFEST_NAME
from flagai_altdiff.registry import MODELS
from tests.cost import in_proportion
from tests.servers import COMMIT, Fault, HubServer, Request, serve

SPEC = MODELS["AltDiffusion-m9"]
FLAGAI = {"config.yaml": b"model: {}", "model.ckpt": bytes(50_000), "sentencepiece.bpe.model": b"pieces"}
DIFFUSERS = {
    "model_index.json": b"{}",
    "text_encoder/config.json": b"{}",
    "unet/config.json": b"{}",
    "vae/config.json": b"{}",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/sentencepiece.bpe.model": b"pieces",
    "text_encoder/pytorch_model.bin": b"text",
    "unet/diffusion_pytorch_model.bin": b"unet",
    "vae/diffusion_pytorch_model.bin": b"vae",
}
REPOSITORY = "BAAI/AltDiffusion-m9"


@pytest.fixture(autouse=True)
def never_waits() -> Iterator[None]:
    """A pipe that is opened is waited for until somebody comes: end that."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise AssertionError("something was waited for")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def baai(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(models={SPEC.name: FLAGAI}) as running:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", running.url)
        yield running


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(repositories={REPOSITORY: DIFFUSERS}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoints" / SPEC.name
    made.mkdir(parents=True)
    return made


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's with a file; nothing here may change it."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "mine").write_bytes(b"mine")
    return place


def has(folder: Path, files: dict[str, bytes]) -> bool:
    return all((folder / name).read_bytes() == data for name, data in files.items())


def when_planned(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something between the plan and the first file."""
    original = disk.check_space

    def late(folder: Path, needed_bytes: int) -> None:
        act()
        original(folder, needed_bytes)

    monkeypatch.setattr(fetching, "check_space", late)


@pytest.mark.fault(124)
@pytest.mark.parametrize(
    "place", [".incoming-baai", ".incoming-baai/model.ckpt.part", f".incoming-baai/{JOURNAL_NAME}"]
)
@pytest.mark.parametrize("second_name", [False, True])
def test_what_is_planted_after_the_plan_is_not_written_through(
    baai: HubServer, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, place: str, second_name: bool
) -> None:
    def plant() -> None:
        (folder / place).parent.mkdir(exist_ok=True)
        if second_name and "/" in place:
            os.link(outside / "mine", folder / place)
        else:
            (folder / place).symlink_to(outside / ("mine" if "/" in place else ""))

    when_planned(monkeypatch, plant)
    with pytest.raises(HubError):
        fetch(SPEC, folder)
    assert os.listdir(outside) == ["mine"] and (outside / "mine").read_bytes() == b"mine"
    assert not (folder / "model.ckpt").exists()


@pytest.mark.fault(124)
def test_a_part_that_becomes_a_link_after_the_plan_is_not_written_into(
    huggingface: HubServer, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fetching._put_in_place

    def late(*arguments: object) -> None:
        (folder / "unet").symlink_to(outside)
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fetching, "_put_in_place", late)
    with pytest.raises(HubError, match="symbolic link"):
        fetch(SPEC, folder)
    assert os.listdir(outside) == ["mine"] and not (folder / "model_index.json").exists()


def while_asked(server: HubServer, name: str, act: Callable[[], object]) -> None:
    """Do something once, while the server thinks about a file."""
    original, done = server.answer, list[bool]()

    def answer(request: Request) -> tuple[int, bytes, dict[str, str]]:
        if request.path.endswith(name) and request.method == "GET" and not done:
            done.append(True)
            act()
        return original(request)

    server.answer = answer  # type: ignore[method-assign]


@pytest.mark.fault(124)
@pytest.mark.parametrize("asked", ["config.yaml", "model.ckpt"])
@pytest.mark.parametrize("how", ["link", "folder", "gone"])
def test_a_staging_folder_that_is_exchanged_while_the_server_thinks_is_not_written_through(
    baai: HubServer, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, asked: str, how: str
) -> None:
    monkeypatch.setattr(threads.run_all, "__defaults__", (1,))
    mine = dict.fromkeys(("config.yaml", "model.ckpt.part", JOURNAL_NAME), b"mine")
    for name, data in mine.items():
        (outside / name).write_bytes(data)
    staging = folder / ".incoming-baai"

    def exchange() -> None:
        staging.rename(folder.parent / "moved")
        if how == "link":
            staging.symlink_to(outside)
        elif how == "folder":
            outside.rename(staging)

    while_asked(baai, f"/{asked}", exchange)
    with pytest.raises(HubError, match=r"\.incoming-baai (is gone|has become)"):
        fetch(SPEC, folder)
    assert os.listdir(folder) == [LOCK_NAME] if how == "gone" else not (folder / "config.yaml").exists()
    place = staging if how == "folder" else outside
    assert has(place, mine) and len(os.listdir(place)) == 4


@pytest.mark.fault(124)
@pytest.mark.parametrize("place", ["unet", ".incoming-huggingface*/unet"])
def test_a_part_that_is_exchanged_while_the_server_thinks_is_not_written_through(
    huggingface: HubServer, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(threads.run_all, "__defaults__", (1,))  # else another file may find neither folder nor link
    name = "diffusion_pytorch_model.bin"
    (outside / name).write_bytes(b"mine")

    def exchange() -> None:
        part = next(folder.glob(place), folder / "unet")
        if part.exists():
            part.rename(folder.parent / "moved")
        part.symlink_to(outside)

    while_asked(huggingface, f"unet/{name}", exchange)
    with pytest.raises(HubError, match=r"symbolic link|has become"):
        fetch(SPEC, folder)
    assert has(outside, {"mine": b"mine", name: b"mine"}) and len(os.listdir(outside)) == 2


@pytest.mark.fault(124)
@pytest.mark.parametrize("how", ["link", "folder"])
def test_a_staging_folder_that_is_exchanged_before_the_move_gives_nothing_away(
    baai: HubServer, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for name in FLAGAI:
        (outside / name).write_bytes(b"mine")
    staging, original = folder / ".incoming-baai", fetching._put_in_place

    def late(*arguments: object) -> None:
        staging.rename(folder.parent / "moved")
        staging.symlink_to(outside) if how == "link" else outside.rename(staging)
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fetching, "_put_in_place", late)
    with pytest.raises(HubError, match="has become"):
        fetch(SPEC, folder)
    place = outside if how == "link" else staging
    assert has(place, dict.fromkeys(["mine", *FLAGAI], b"mine")) and not (folder / "config.yaml").exists()


@pytest.mark.fault(124)
def test_what_is_tidied_up_is_not_followed(baai: HubServer, folder: Path, outside: Path) -> None:
    (folder / ".incoming-huggingface").mkdir()
    (folder / ".incoming-huggingface" / "link").symlink_to(outside)
    (folder / f".incoming-mirror-{'0' * 12}").symlink_to(outside)
    fetch(SPEC, folder)
    assert has(folder, FLAGAI) and (outside / "mine").read_bytes() == b"mine"
    assert not (folder / ".incoming-huggingface").exists()


@pytest.mark.fault(124)
def test_a_waiting_process_does_not_walk_through_a_planted_link(folder: Path, outside: Path) -> None:
    (folder / ".incoming-baai").symlink_to(outside)
    assert fetching._arrived_bytes(folder) == 0


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # its name may have 100 characters only
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


STRANGE = [fifo, unix_socket, device, loop, dangling, Path.mkdir]
strange = pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)


@pytest.mark.fault(125)
@strange
@pytest.mark.parametrize("name", ["model.ckpt", "config.yaml", "sentencepiece.bpe.model"])
def test_what_is_no_file_stands_in_the_way_and_is_never_opened(
    baai: HubServer, folder: Path, make: Callable[[Path], object], name: str
) -> None:
    make(folder / name)
    kind = os.lstat(folder / name).st_mode
    with in_proportion(0), pytest.raises(FilesInTheWayError, match=name):
        fetch(SPEC, folder, source="baai")
    assert os.lstat(folder / name).st_mode == kind
    assert not [path for path in baai.paths() if path.startswith("/files/")]


@pytest.mark.fault(125)
@strange
def test_a_manifest_that_is_no_file_is_never_opened(
    baai: HubServer, folder: Path, make: Callable[[Path], object]
) -> None:
    make(folder / MANIFEST_NAME)
    with in_proportion(0):
        if make is dangling:
            assert manifest.read(folder) == {}
        else:
            for read in (manifest.read, record_missing, lambda place: list(verify(place, SPEC))):
                with pytest.raises(HubError):
                    read(folder)
        if make is Path.mkdir:
            with pytest.raises(HubError, match="is a folder"):
                fetch(SPEC, folder)
            assert not [path for path in baai.paths() if path.startswith("/files/")]
        else:
            fetch(SPEC, folder)
            assert has(folder, FLAGAI) and stat.S_ISREG(os.lstat(folder / MANIFEST_NAME).st_mode)


@pytest.mark.fault(125)
@strange
@pytest.mark.parametrize("place", ["", "/model.ckpt", "/model.ckpt.part", "/model.ckpt.part.json", f"/{JOURNAL_NAME}"])
def test_a_staging_folder_with_something_strange_is_never_waited_for(
    baai: HubServer, folder: Path, make: Callable[[Path], object], place: str
) -> None:
    path = folder / f".incoming-baai{place}"
    path.parent.mkdir(exist_ok=True)
    make(path)
    refused = ""
    with in_proportion(0):
        try:
            fetch(SPEC, folder)
        except HubError as error:
            refused = str(error)
    assert ".incoming-baai" in refused if refused else has(folder, FLAGAI)
    assert not refused or not (folder / "config.yaml").exists()


@pytest.mark.fault(125)
@strange
def test_a_lock_that_is_no_file_is_never_opened(folder: Path, make: Callable[[Path], object]) -> None:
    make(folder / LOCK_NAME)
    with in_proportion(0), pytest.raises(HubError, match="Choose a folder"), folder_lock(folder, lambda: ""):
        pass


@pytest.mark.fault(122)
def test_a_file_of_the_users_with_the_locks_name_stays(baai: HubServer, folder: Path) -> None:
    (folder / LOCK_NAME).write_bytes(b"mine")
    fetch(SPEC, folder)
    assert (folder / LOCK_NAME).read_bytes() == b"mine"


@pytest.mark.fault(125)
@strange
def test_verify_and_record_pass_over_what_is_no_file(
    baai: HubServer, folder: Path, make: Callable[[Path], object]
) -> None:
    fetch(SPEC, folder)
    (folder / "model.ckpt").unlink()
    make(folder / "model.ckpt")
    make(folder / "more.json")
    with in_proportion(0):
        assert {c.name: c.state for c in verify(folder, SPEC)}["model.ckpt"] == "unreadable"
        assert record_missing(folder) == []
        assert missing_files(SPEC, folder) == ["model.ckpt"]


@pytest.mark.fault(125)
@strange
@pytest.mark.parametrize("place", ["refs/main", "unet/diffusion_pytorch_model.bin"])
def test_a_cache_with_something_strange_is_never_waited_for(
    huggingface: HubServer, folder: Path, make: Callable[[Path], object], place: str
) -> None:
    repository = Path(os.environ["HF_HOME"]) / "hub" / "models--BAAI--AltDiffusion-m9"
    snapshot = repository / "snapshots" / COMMIT
    for name, data in DIFFUSERS.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(data)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    path = (repository if "refs" in place else snapshot) / place
    path.unlink()
    make(path)
    with in_proportion(0):
        fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)


@pytest.mark.fault(125)
def test_a_cache_reference_without_end_is_not_read(huggingface: HubServer, folder: Path) -> None:
    refs = Path(os.environ["HF_HOME"]) / "hub" / "models--BAAI--AltDiffusion-m9" / "refs"
    refs.mkdir(parents=True)
    with open(refs / "main", "wb") as file:
        file.truncate(1 << 40)
    with in_proportion(0):
        fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)


@pytest.mark.fault(125)
def test_a_regular_file_is_opened_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"x"
    before = len(os.listdir("/proc/self/fd"))
    for place in (tmp_path, Path("/dev/zero"), tmp_path / "nowhere"):
        with pytest.raises(OSError):  # noqa: PT011
            open_regular(place)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.fault(126)
def test_the_record_of_1500_files_is_written_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = DIFFUSERS | {f"unet/part-{n:04}.json": b"{}" for n in range(1500)}
    written: list[Path] = []
    original = manifest.write

    def write(place: Path, records: dict[str, manifest.FileRecord]) -> None:
        written.append(place)
        original(place, records)

    monkeypatch.setattr(manifest, "write", write)
    staging = tmp_path / "staging"
    staging.mkdir()
    journal = Journal(staging, Digests())
    for name in files:
        (staging / name.replace("/", "-")).write_bytes(b"{}")
        journal.add(name.replace("/", "-"), hashlib.sha256(b"{}").hexdigest(), '"etag"')
    with in_proportion(1 << 20):
        assert Journal(staging, Digests()).get("unet-part-0007.json") is not None
    assert (staging / JOURNAL_NAME).stat().st_size < 300 * len(files)
    with serve(repositories={REPOSITORY: files}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        fetch(SPEC, folder)
    assert written == [folder] and len(manifest.read(folder)) == len(files)


@pytest.mark.fault(126)
@pytest.mark.parametrize(
    "tail", [b'{"name": "a.json", "sha2', b"\xff\n", b"[" * 100_000, b'{"name": 1, "stamp": 7}\n', b"\n" * 99]
)
def test_a_journal_that_a_crash_cut_off_goes_on(tmp_path: Path, tail: bytes) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_bytes(b"{}")
    journal = Journal(tmp_path, Digests())
    journal.add("a.json", "0" * 64, None)
    with open(tmp_path / JOURNAL_NAME, "ab") as file:
        file.write(tail)
    Journal(tmp_path, Digests()).add("b.json", "1" * 64, '"x"')
    again = Journal(tmp_path, Digests())
    found = [again.get("a.json"), again.get("b.json")]
    assert [arrival and arrival.sha256 for arrival in found] == ["0" * 64, "1" * 64]
    (tmp_path / "a.json").write_bytes(b"other")
    assert again.get("a.json") is None


@pytest.mark.fault(126)
@pytest.mark.parametrize(
    "piece",
    [
        b"\n",
        b"x\n",
        b"{}\n",
        b"{\n",
        b'{"stamp":[]}\n',
        b'{"name":"a","sha256":"b","stamp":[1,2,3]}\n',
        b'{"name":"' + b"a/" * 4000 + b'","sha256":"b","stamp":[1,2,3]}\n',
        b"[" * 1000,
        b'{"a":' * 1000 + b"\n",
        b"\r\x0b",
    ],
    ids=lambda piece: str(piece[:12]),
)
@pytest.mark.parametrize("size", [1 << 20, journal.MAX_BYTES, 9 << 20])
def test_a_hostile_journal_is_read_at_its_price(tmp_path: Path, piece: bytes, size: int) -> None:
    (tmp_path / "a.json").write_bytes(b"{}")
    Journal(tmp_path, Digests()).add("a.json", "0" * 64, None)
    line = (tmp_path / JOURNAL_NAME).read_bytes()
    count = (size - len(line)) // len(piece)
    (tmp_path / JOURNAL_NAME).write_bytes(piece * count + line)
    with in_proportion(1 << 20):
        found = Journal(tmp_path, Digests()).get("a.json")
    assert (found is not None) == (size <= journal.MAX_BYTES)


def record(**fields: object) -> dict[str, object]:
    return {"name": "model.ckpt", "size_bytes": 1, "sha256": "0" * 64, "source": "baai"} | fields


def book(*records: object) -> str:
    return json.dumps({"version": 1, "files": records})


HOSTILE = {
    "a size of 6,000 digits": book(record(size_bytes=0)).replace('"size_bytes": 0', '"size_bytes": ' + "9" * 6000),
    "a size of 4,000 digits": book(record(size_bytes=10**4000)),
    "a size of 1e400": book(record()).replace('"size_bytes": 1', '"size_bytes": 1e400'),
    "a size that is no number": book(record(size_bytes=float("nan"))),
    "a nested size": book(record(size_bytes=[[1]])),
    "a nested version": json.dumps({"version": [[1]] * 1000, "files": []}),
    "a list for a name": book(record(name=["model.ckpt"])),
    "half a character for a name": book(record(name="\ud800.json")),
    "a name of 300 letters": book(record(name="x" * 300)),
    "a name of a million letters": book(record(name="x" * 1_000_000)),
    "a name of a million levels": book(record(name="a/" * 1_000_000 + "a")),
    "a thousand names of 500 levels": book(*(record(name=f"{n}/" + "a/" * 498 + "x") for n in range(1000))),
    "a key of a million letters": book(record(**{"x" * 1_000_000: 1})),
    "a key twice": book(record()).replace('"source"', '"name": "config.yaml", "source"'),
    "a file twice": book(record(), record(size_bytes=2)),
    "100,000 records": book(*({"name": n} for n in range(100_000))),
    "100,000 whole records": "[" + ",".join([json.dumps(record())] * 20_000) + "]",
    "a million lists": json.dumps([[]] * 1_000_000),
    "a number for everything": "7",
    "null": "null",
    "an escape": book(record(name="\x1b[2J")),
}


@pytest.mark.fault(126, 127)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_record_is_refused_at_its_price(folder: Path, text: str) -> None:
    (folder / MANIFEST_NAME).write_text(text)
    (folder / "a.json").write_bytes(b"{}")
    for read in (manifest.read, record_missing, lambda place: list(verify(place, SPEC))):
        with in_proportion(len(text)), pytest.raises(HubError) as caught:
            read(folder)
        assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()
        assert MANIFEST_NAME in str(caught.value) or "refused the file name" in str(caught.value)
    assert (folder / MANIFEST_NAME).read_text() == text


@pytest.mark.fault(126, 127)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_list_of_a_mirror_is_left_at_its_price(folder: Path, text: str, baai: HubServer) -> None:
    with serve(files={f"/{MANIFEST_NAME}": text.encode()}) as mirror:
        with in_proportion(len(text)), pytest.raises(HubError) as caught:
            fetch(SPEC, folder, source=mirror.url)
        assert len(str(caught.value)) < 2000
        os.environ["FLAGAI_ALTDIFF_MIRROR"] = mirror.url
        try:
            fetch(SPEC, folder)
        finally:
            del os.environ["FLAGAI_ALTDIFF_MIRROR"]
    assert has(folder, FLAGAI)


@pytest.mark.fault(126)
def test_a_record_of_the_most_files_is_read_at_its_price(folder: Path) -> None:
    records = {
        f"unet/{n:05}.json": manifest.FileRecord(
            name=f"unet/{n:05}.json", size_bytes=1, sha256="0" * 64, source="x" * 200
        )
        for n in range(manifest.MAX_RECORDS)
    }
    manifest.write(folder, records)
    with in_proportion((folder / MANIFEST_NAME).stat().st_size):
        assert len(manifest.read(folder)) == len(records)
    with pytest.raises(HubError, match="at most 5,000"):
        manifest.write(folder, {**records, "a": next(iter(records.values()))})


@pytest.mark.fault(126)
def test_a_folder_of_too_many_files_is_not_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_RECORDS", 5)
    for n in range(6):
        (folder / f"{n}.json").write_bytes(b"{}")
    with pytest.raises(HubError, match="6 files to record"):
        record_missing(folder)
    assert not (folder / MANIFEST_NAME).exists()


@pytest.mark.fault(126)
@pytest.mark.parametrize("name", ["a:b.json", "A.json"])
def test_a_record_that_could_not_be_read_again_is_not_written(folder: Path, name: str) -> None:
    for file in ("a.json", name):
        (folder / file).write_bytes(b"{}")
    with pytest.raises(HubError, match="refused the file name"):
        record_missing(folder)
    assert not (folder / MANIFEST_NAME).exists()


@pytest.mark.fault(126)
@pytest.mark.parametrize("count", [planning.MAX_FILES + 1, 60_000])
def test_a_list_without_end_is_left(baai: HubServer, folder: Path, count: int) -> None:
    names = [*FLAGAI, *(f"{n}.json" for n in range(count))]
    baai.faults["/api/searchModelFileByName"] = [Fault(body=json.dumps(names)[: 1 << 22].encode())]
    with pytest.raises(HubUnavailableError):
        fetch(SPEC, folder, source="baai")
    assert "/api/downloadCode" not in baai.paths()


@pytest.mark.fault(127)
def test_a_file_where_a_folder_is_needed_is_named(huggingface: HubServer, folder: Path) -> None:
    (folder / "unet").write_bytes(b"mine")
    with pytest.raises(HubError, match=r"unet is no folder.*Move it away"):
        fetch(SPEC, folder)
    assert (folder / "unet").read_bytes() == b"mine"
    assert not [path for path in huggingface.paths() if "unet/" in path]


@pytest.mark.fault(127)
@pytest.mark.parametrize(
    "name",
    ["x" * 300, "a\0b", "\udcff" * 3, "file/below", "a" * 200 + "/" + "b" * 250],
    ids=["long", "zero byte", "no text", "below a file", "two long ones"],
)
def test_a_folder_that_cannot_be_is_an_error_of_ours(
    baai: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO, "flagai_altdiff")
    (tmp_path / "file").write_bytes(b"mine")
    place = tmp_path / name
    for door in (fetch, plan):
        try:
            door(SPEC, place)
        except HubError as error:
            str(error).encode()
    for read in (record_missing, lambda there: list(verify(there, SPEC)), lambda there: missing_files(SPEC, there)):
        try:
            read(place)
        except HubError as error:
            str(error).encode()
    assert (tmp_path / "file").read_bytes() == b"mine"
    caplog.text.encode()


@pytest.mark.fault(127)
def test_what_nobody_foresaw_sends_us_to_the_next_source(
    baai: HubServer, huggingface: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprise(name: str, revision: str | None = None) -> list[object]:
        raise KeyError("\x1b[2J")

    monkeypatch.setattr("flagai_altdiff.hub.baai.list_files", surprise)
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)


@pytest.mark.fault(127)
def test_a_file_that_comes_empty_ends_the_source(baai: HubServer, huggingface: HubServer, folder: Path) -> None:
    baai.models[SPEC.name]["config.yaml"] = b""
    baai.always["/files/100000/config.yaml"] = Fault(chunked=True)
    fetch(SPEC, folder)
    assert missing_files(SPEC, folder) == [] and has(folder, DIFFUSERS)


@pytest.mark.fault(128)
@pytest.mark.parametrize("size", [1 << 59, 1 << 38, 20_000_000_000])
def test_a_size_beyond_belief_sends_us_to_the_next_source(
    baai: HubServer, huggingface: HubServer, folder: Path, size: int
) -> None:
    """The first source's claim says nothing about this disk."""
    answer = json.dumps({"code": "20000", "url": f"{baai.url}/x", "size": size}).encode()
    baai.always["/api/downloadCode"] = Fault(body=answer)
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)
    assert "/x" not in baai.paths()


@pytest.mark.fault(128)
def test_many_large_files_are_beyond_belief_together(baai: HubServer, folder: Path) -> None:
    records = [record(name=f"unet/{n}.safetensors", size_bytes=9_000_000_000) for n in range(5)]
    records += [record(name=name) for name in FLAGAI]
    with serve(files={f"/{MANIFEST_NAME}": book(*records).encode()}) as mirror:
        with pytest.raises(HubError, match="the model has about 8,000,000,000"):
            fetch(SPEC, folder, source=mirror.url)
        os.environ["FLAGAI_ALTDIFF_MIRROR"] = mirror.url
        try:
            fetch(SPEC, folder)
        finally:
            del os.environ["FLAGAI_ALTDIFF_MIRROR"]
    assert has(folder, FLAGAI)


@pytest.mark.fault(128)
@pytest.mark.parametrize("length", ["127000000000", "33000000000", "900000000000000000"])
def test_a_size_that_only_the_transfer_tells_sends_us_on(
    baai: HubServer, huggingface: HubServer, folder: Path, length: str
) -> None:
    """The hub announces no size, and the file then has one that the disk, or any model, has not."""
    answer = json.dumps({"code": "20000", "url": f"{baai.url}/x", "size": 0}).encode()
    baai.always["/api/downloadCode"] = Fault(body=answer)
    baai.always["/x"] = Fault(body=b"x", headers={"Content-Length": length})
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)


@pytest.mark.fault(129)
def test_what_other_programs_obey_is_not_taken(baai: HubServer, folder: Path) -> None:
    obeyed = (
        "package.json",
        "docker-compose.yaml",
        "requirements.txt",
        "CMakeLists.txt",
        "conftest.json",
        ".index.json",
    )
    baai.models[SPEC.name] |= dict.fromkeys(obeyed, b"{}")
    baai.models[SPEC.name] |= {"vocab.json": b"{}", "model.safetensors.index.json": b"{}"}
    fetch(SPEC, folder)
    assert not any((folder / name).exists() for name in obeyed)
    assert (folder / "vocab.json").exists() and (folder / "model.safetensors.index.json").exists()


ALIEN = [
    ".git/hooks/post-checkout",
    ".git/hooks/post-checkout.json",
    "setup.exe",
    "unet/run.bat",
    "run.py",
    "conftest.py",
    "sitecustomize.py",
    "unet/deeper/config.json",
    "scripts/config.json",
    "__MACOSX/config.json",
    "model.ckpt.sh",
    "desktop.ini",
    "Makefile",
    "README.md",
    "图.png",
]


@pytest.mark.fault(129)
def test_only_files_of_models_are_taken(baai: HubServer, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    baai.models[SPEC.name] |= dict.fromkeys(ALIEN, b"alien")
    fetch(SPEC, folder)
    assert sorted(os.listdir(folder)) == sorted([*FLAGAI, MANIFEST_NAME, LOCK_NAME])
    assert not [path for path in baai.paths() if path.startswith("/files/") and path.rpartition("/")[2] not in FLAGAI]
    lines = [r.getMessage() for r in caplog.records if "no part of a model" in r.getMessage()]
    assert len(lines) == 1 and f"passed over {len(ALIEN)} files" in lines[0]


@pytest.mark.fault(129)
def test_a_mirrors_list_places_nothing_else_either(folder: Path) -> None:
    files = FLAGAI | dict.fromkeys(ALIEN, b"alien")
    records = [record(name=n, size_bytes=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in files.items()]
    served = {**files, MANIFEST_NAME: book(*records).encode()}
    with serve(files={f"/{name}": data for name, data in served.items()}) as mirror:
        fetch(SPEC, folder, source=mirror.url)
    assert sorted(os.listdir(folder)) == sorted([*FLAGAI, MANIFEST_NAME, LOCK_NAME])


@pytest.mark.fault(129)
def test_a_list_of_nothing_but_such_files_is_no_model(baai: HubServer, folder: Path) -> None:
    baai.models[SPEC.name] = dict.fromkeys(ALIEN, b"alien")
    with pytest.raises(ModelNotFoundError, match=r"without config\.yaml"):
        fetch(SPEC, folder, source="baai")
    assert os.listdir(folder) == [LOCK_NAME]
