"""Shards: read as webdataset reads them, at any place; damaged, odd and hostile ones; shards of servers that fail."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagai_altdiff.errors import BrokenExampleError, DataError
from flagai_altdiff.hub import client
from flagai_altdiff.tar import BrokenTarError, Member, members
from flagai_altdiff.training.data.example import Caption, Examples
from flagai_altdiff.training.data.filters import Filters
from flagai_altdiff.training.data.opening import open_examples
from flagai_altdiff.training.data.shard_names import braces, expand
from flagai_altdiff.training.data.source import Reading
from tests.cost import in_proportion
from tests.data_files import image_bytes, plain_shard, sample, shard_bytes, tar_bytes
from tests.servers import Fault, HubServer, serve

PNG = image_bytes()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)


def write(folder: Path, shards: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    return folder


def texts(examples: Examples) -> list[str]:
    """The first caption of each, or why it is broken."""
    found = []
    for i in range(len(examples)):
        try:
            found.append(examples[i].captions[0].text)
        except BrokenExampleError as error:
            found.append(error.reason)
    return found


def test_what_stands_in_a_shard(tmp_path: Path) -> None:
    fields = {"caption": "of json", "LANGUAGE": "de", "AESTHETIC_SCORE": 6.1, "width": 20, "height": 16}
    files = [
        ("000.png", PNG), ("000.txt", b"of text"), ("000.json", json.dumps(fields).encode()),
        ("001.png", PNG), ("001.txt", b"one\ntwo"), ("001.fr.txt", "trois".encode("utf-16")), ("001.npy", b"x"),
        ("002.PNG", PNG), ("002.json", b'{"language": "it"}'), ("002.txt", b"uno"),
        ("003.txt", b"no image"),
        ("004.png", PNG),
        ("005.png", PNG), ("005.json", b"{"),
        ("006.png", PNG), ("006.txt", b"\xe9"),
        ("007.png", PNG[:60]), ("007.txt", b"cut"),
        ("008.png", PNG), ("008.json", b"[]"),
        ("__meta__", b""), ("._000.png", b"mac"), ("dir/.x.png", b""),
    ]  # fmt: skip
    folder = write(tmp_path / "data", {"00000.tar": tar_bytes(files)})
    examples = open_examples(folder)
    assert list(examples.keys) == [f"00000/00{i}" for i in (0, 1, 2, 5, 6, 7, 8)]
    assert examples[0].captions == (Caption("of json", "de"),)
    assert examples[1].captions == (Caption("one"), Caption("two"), Caption("trois", "fr"))
    assert examples[2].captions == (Caption("uno", "it"),)
    assert texts(examples)[3:] == [
        "metadata are not JSON",
        "text is not UTF-8",
        "truncated or damaged image",
        "no caption",
    ]
    assert examples.left_out.names == {"no image": ["00000.tar: 003"], "no caption": ["00000.tar: 004"]}
    assert len(open_examples(folder, Reading(caption=""))) == 8


def test_the_same_as_webdataset(tmp_path: Path) -> None:
    """The library's own writer and reader, over keys with folders and dots."""
    import webdataset as wds

    path = tmp_path / "0.tar"
    with wds.TarWriter(str(path)) as writer:
        for i, key in enumerate(("a", "deep/er/b", "000000002", "ünï 字", "x" * 150)):
            writer.write(
                {"__key__": key, "png": image_bytes((i, 0, 0)), "txt": f"text {i}", "json": {"caption": f"{i}"}}
            )
    theirs = list(wds.WebDataset(str(path), shardshuffle=False))
    ours = open_examples(path, Reading(caption=""))
    assert [f"0/{one['__key__']}" for one in theirs] == list(ours.keys)
    for one, i in zip(theirs, range(len(ours)), strict=True):
        image = ours[i].image
        assert image is not None and image.getpixel((0, 0)) == (i, 0, 0) and one["png"] == image_bytes((i, 0, 0))
        assert ours[i].captions == (Caption(json.loads(one["json"])["caption"]),)


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=130), st.integers(0, 1500)), max_size=6),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=100, deadline=None)
def test_archives_are_read_as_python_reads_them(files: list[tuple[str, int]], format: int) -> None:
    if format == tarfile.USTAR_FORMAT:
        files = [(f"{i}.bin", size) for i, (_, size) in enumerate(files)]
    contents = [(name.replace("\0", "_"), os.urandom(size)) for name, size in files]
    try:
        data = tar_bytes(contents, format)
    except UnicodeEncodeError:  # a lone surrogate has no name in an archive
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    ours = list(members(io.BytesIO(data), len(data)))
    assert [(m.offset, m.size) for m in ours] == [(m.offset, m.size) for m in theirs]
    assert [m.name.rstrip("/") for m in ours] == [m.name for m in theirs] or any("/" in name for name, _ in files)


@pytest.mark.parametrize("cut", [513, 540])
def test_archives_without_a_whole_file(cut: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 damaged shard: 0\.tar: it is truncated after its beginning"):
        open_examples(write(tmp_path, {"0.tar": plain_shard(3)[:cut]}) / "0.tar", Reading(caption=""))


@pytest.mark.parametrize("cut", [1600, 2000, 2048, 2100, 3000, 4096, 6144])
def test_truncated_archives(cut: int, tmp_path: Path) -> None:
    """What came whole is used; that there was more is told, be it cut off between two files."""
    whole = plain_shard(3)
    ends = {m.name: m.offset + m.size for m in members(io.BytesIO(whole), len(whole))}
    found = open_examples(write(tmp_path, {"0.tar": whole[:cut]}) / "0.tar")
    assert "truncated after" in found.left_out.names["damaged shard"][0]
    assert texts(found) == [f"number {i}" for i in range(3) if ends[f"{i:09}.txt"] <= cut]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "1 shard without examples: 0.tar"),
        (bytes(10240), "1 shard without examples: 0.tar"),
        (b"<html>" * 200, "there is no tar header after its beginning"),
        (gzip.compress(plain_shard(1)) + bytes(512), "it is compressed: gunzip it first"),
        (b"\0" * 511 + b"x", "there is no tar header"),
    ],
)
def test_what_is_no_shard(content: bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        open_examples(write(tmp_path, {"0.tar": content}) / "0.tar")


def test_damaged_shards_do_not_stop_the_others(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "data", {"0.tar": plain_shard(2), "1.tar": b"x" * 999, "2.tar": b"", "3.tar": plain_shard(1, 7)}
    )
    examples = open_examples(folder)
    assert texts(examples) == ["number 0", "number 1", "number 7"] and examples.layout.parts == (2, 0, 0, 1)
    assert examples.left_out.counts == {"damaged shard": 1, "shard without examples": 2}


def test_odd_members(tmp_path: Path) -> None:
    """Names that lead elsewhere name nothing: nothing is unpacked. Links, devices and folders are no examples."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "l.png"), (tarfile.CHRTYPE, "c.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in (
            "../../up.png",
            "/abs.png",
            "new\nline.png",
            "esc\x1b[2J.png",
            "y" * 300 + ".png",
            "a.png",
            "a.png",
        ):
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
    examples = open_examples(write(tmp_path, {"0.tar": buffer.getvalue()}) / "0.tar", Reading(caption="x"))
    assert texts(examples) == ["x"] * 6
    assert examples.left_out.names == {"file twice in a shard": ["0.tar: a.png"]}


def test_texts_in_thousands_of_languages_cost_as_many_times_more(tmp_path: Path) -> None:
    def cost_s(count: int) -> float:
        files = [("a.png", PNG), *((f"a.de-x{number:05}.txt", b"t") for number in range(count))]
        shard = write(tmp_path, {f"{count}.tar": tar_bytes(files)}) / f"{count}.tar"
        start = time.process_time()
        assert len(open_examples(shard)[0].captions) == count
        return time.process_time() - start

    cost_s(10)
    assert cost_s(16_000) < 24 * cost_s(2000)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_anything_is_an_archive_or_an_error(data: Any) -> None:
    good = bytearray(plain_shard(2))
    for _ in range(data.draw(st.integers(1, 5))):
        good[data.draw(st.integers(0, 2100))] = data.draw(st.integers(0, 255))
    with in_proportion(len(good)):
        try:
            found = list(members(io.BytesIO(bytes(good)), len(good)))
        except BrokenTarError:
            return
    assert all(m.offset >= 0 and m.offset + m.size <= len(good) for m in found)


def test_a_shard_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", {"0.tar": plain_shard(3)})
    first = texts(open_examples(folder))
    assert (folder / ".0.tar.altdiff-index").is_file()

    def refuse(*args: object) -> Iterator[Member]:
        raise AssertionError("looked through again")

    monkeypatch.setattr("flagai_altdiff.training.data.shard.members", refuse)
    assert texts(open_examples(folder)) == first
    assert texts(pickle.loads(pickle.dumps(open_examples(folder)))) == first
    monkeypatch.undo()
    (folder / "0.tar").write_bytes(plain_shard(2, 5))
    assert texts(open_examples(folder)) == ["number 5", "number 6"]


def test_notes_go_elsewhere_if_the_folder_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", {"0.tar": plain_shard(3)})
    (folder / ".0.tar.altdiff-index").mkdir()  # nobody can write a file of this name
    how = Reading(cache=tmp_path / "mine")
    assert len(texts(open_examples(folder, how))) == 3
    assert [path.name for path in (tmp_path / "mine").rglob("*index")] == [".0.tar.altdiff-index"]
    monkeypatch.setattr("flagai_altdiff.training.data.shard.members", None)
    assert len(open_examples(folder, how)) == 3


@pytest.mark.parametrize("cut", [0, 3, 50, -1, -8, -30])
def test_damaged_notes_are_not_believed(cut: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"0.tar": plain_shard(3)})
    expected, note = texts(open_examples(folder)), folder / ".0.tar.altdiff-index"
    note.write_bytes(note.read_bytes()[:cut])
    assert texts(open_examples(folder)) == expected
    line, _, rest = note.read_bytes().partition(b"\n")
    header = json.loads(line)
    wrong: dict[str, Any]
    for wrong in ({"columns": {"first": 10**15}}, {"columns": {}}, {"about": []}, {"columns": None}):
        note.write_bytes(json.dumps({**header, **wrong}).encode() + b"\n" + rest)
        assert texts(open_examples(folder)) == expected
    for content in (b"\xff" * len(rest), b"\x01" + bytes(len(rest) - 1), bytes(len(rest))):
        digest = hashlib.blake2b(content, digest_size=12).hexdigest()
        note.write_bytes(json.dumps({**header, "digest": digest}).encode() + b"\n" + content)
        assert texts(open_examples(folder)) == expected


def test_filters_are_noted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample(i, json_fields={"caption": f"t{i}", "LANGUAGE": "de" if i % 2 else "en"}) for i in range(6)]
    folder = write(tmp_path / "data", {"0.tar": shard_bytes(samples[:3]), "1.tar": shard_bytes(samples[3:], 3)})
    german = Reading(filters=Filters(languages=("de",)))
    examples = open_examples(folder, german)
    assert texts(examples) == ["t1", "t3", "t5"] and list(examples.keys)[1] == "1/000000003"
    assert examples.left_out.counts == {"no caption in a wanted language": 3}
    monkeypatch.setattr("flagai_altdiff.training.data.source.Selection._choose", None)
    again = open_examples(folder, german)
    assert texts(again) == ["t1", "t3", "t5"] and again.left_out == examples.left_out


def test_patterns_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", {"00000.tar": plain_shard(1), "00001.tar": plain_shard(1, 1)})
    write(tmp_path / "b", {"00000.tar": plain_shard(1, 2)})
    monkeypatch.chdir(tmp_path)
    assert texts(open_examples("a/{00000..00001}.tar")) == ["number 0", "number 1"]
    assert texts(open_examples("*/00000.tar")) == ["number 0", "number 2"]
    both = open_examples(["b/00000.tar", "a/*.tar", "a/00000.tar"])
    assert texts(both) == ["number 2", "number 0", "number 1"]
    assert list(both.keys)[:2] == ["b/00000/000000002", "a/00000/000000000"]
    with pytest.raises(DataError, match=r"shard a/00002\.tar cannot be read: No such file"):
        open_examples("a/{00000..00002}.tar")
    some = open_examples("a/{00000..00002}.tar", Reading(skip_shards=True))
    assert len(some) == 2 and some.left_out.names == {"shard that cannot be had": ["a/00002.tar"]}


def test_braces() -> None:
    assert braces("x{08..11}y{a,b}") == [f"x{i}y{j}" for i in ("08", "09", "10", "11") for j in "ab"]
    assert braces("{2..0}") == ["2", "1", "0"] and braces("a{b}c") == ["a{b}c"] and braces("{,x}") == ["", "x"]
    assert len(expand(["http://h/{00000..41455}.tar"])) == 41456
    with in_proportion(1), pytest.raises(DataError, match="more than"):
        braces("{0..999999999999}")
    with in_proportion(1), pytest.raises(DataError, match="more than"):
        braces("{0..9999}{0..9999}")


@pytest.fixture
def server() -> Iterator[HubServer]:
    with serve(files={f"/{i:05}.tar": plain_shard(2, 2 * i) for i in range(3)}) as hub:
        yield hub


def test_shards_of_a_server(server: HubServer, tmp_path: Path) -> None:
    pattern = f"{server.url}/{{00000..00002}}.tar"
    assert texts(open_examples(pattern)) == [f"number {i}" for i in range(6)]
    server.always = {path: Fault(status=500) for path in server.files}
    assert texts(open_examples(pattern)) == [f"number {i}" for i in range(6)]


def test_a_server_that_stumbles(server: HubServer) -> None:
    server.faults["/00001.tar"] = [Fault(cut_at=1000), Fault(status=503), Fault(cut_at=500, reset=True)]
    assert texts(open_examples(f"{server.url}/00001.tar")) == ["number 2", "number 3"]
    assert server.ranges("/00001.tar")[-1] is not None


def test_a_server_that_dies(server: HubServer) -> None:
    server.always["/00001.tar"] = Fault(status=500)
    pattern = f"{server.url}/{{00000..00002}}.tar"
    with pytest.raises(DataError, match=r"shard http://.*/00001\.tar cannot be had: .*HTTP 500.*leave out such shards"):
        open_examples(pattern)
    examples = open_examples(pattern, Reading(skip_shards=True))
    assert texts(examples) == ["number 0", "number 1", "number 4", "number 5"]
    assert examples.left_out.names == {"shard that cannot be had": [f"{server.url}/00001.tar"]}


def test_addresses_keep_their_secrets(server: HubServer) -> None:
    with pytest.raises(DataError) as caught:
        open_examples(server.url.replace("http://", "http://me:secret@") + "/gone.tar?token=hidden")
    assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)


def test_stats_save_a_download(server: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    server.files |= {f"/{i:05}_stats.json": json.dumps({"successes": n}).encode() for i, n in enumerate((2, 3, 1))}
    pattern = f"{server.url}/{{00000..00002}}.tar"
    examples = open_examples(pattern)
    assert len(examples) == 6 and not any(path.endswith(".tar") for path in server.paths())
    assert examples[0].captions[0].text == "number 0"
    assert [path for path in server.paths() if path.endswith(".tar")] == ["/00000.tar"]
    assert texts(examples) == [
        "number 0",
        "number 1",
        "number 2",
        "number 3",
        "not in its shard, which has fewer than its stats say",
        "number 4",
    ]
    assert "00002.tar has 1 more examples than its stats say" in caplog.text
    asked = len(server.requests)
    assert open_examples(pattern).layout == examples.layout and len(server.requests) == asked
    assert len(open_examples(f"{server.url}/{{00001..00002}}.tar", Reading(fetch_all=True))) == 4
    assert len(open_examples(f"{server.url}/{{00001..00001}}.tar", Reading(filters=Filters(min_text=1)))) == 2


def test_a_server_that_dies_while_training(server: HubServer) -> None:
    server.files |= {"/00000_stats.json": b'{"successes": 2}'}
    examples = open_examples(f"{server.url}/00000.tar")
    skipping = open_examples(f"{server.url}/00000.tar", Reading(skip_shards=True))
    server.always["/00000.tar"] = Fault(status=500)
    with pytest.raises(DataError, match=r"00000\.tar cannot be had") as caught:
        examples[0]
    assert not isinstance(caught.value, BrokenExampleError)
    asked = len(server.requests)
    assert texts(skipping) == ["shard that cannot be had"] * 2
    assert len(server.requests) > asked


def test_offline(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGAI_ALTDIFF_OFFLINE", "1")
    with pytest.raises(DataError, match="FLAGAI_ALTDIFF_OFFLINE=1 forbids downloads"):
        open_examples(f"{server.url}/00000.tar")
    assert not server.requests
