"""Files and folders appear whole or not at all, with the umask's permissions, and nothing of the process changes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flagai_altdiff.files import new_file, new_folder


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_appears_when_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    with new_file(target) as unfinished:
        assert unfinished.parent == tmp_path and unfinished.name.startswith(".")
        unfinished.write_bytes(b"whole")
        assert not target.exists()
    assert (left(tmp_path), target.read_bytes()) == (["model.safetensors"], b"whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full"), ValueError])
def test_a_block_that_fails_leaves_nothing(error: BaseException | type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    expected = error if isinstance(error, type) else type(error)
    with pytest.raises(expected), new_file(tmp_path / "old", replace=True) as unfinished:  # noqa: PT012
        unfinished.write_bytes(b"half")
        raise error
    with pytest.raises(expected), new_folder(tmp_path / "folder") as made:  # noqa: PT012
        (made / "file").write_bytes(b"half")
        raise error
    assert (left(tmp_path), (tmp_path / "old").read_bytes()) == (["old"], b"old")


def test_what_is_there_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError), new_file(target) as unfinished:
        unfinished.write_bytes(b"new")
    assert target.read_bytes() == b"mine"
    with new_file(target, replace=True) as unfinished:
        unfinished.write_bytes(b"new")
    assert (left(tmp_path), target.read_bytes()) == (["a"], b"new")


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), new_file(tmp_path / "a") as unfinished:  # noqa: PT012
        unfinished.write_bytes(b"new")
        (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "b") as made:  # noqa: PT012
        (made / "file").touch()
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "mine").touch()
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert left(tmp_path) == ["a", "b"] and left(tmp_path / "b") == ["mine"]


def test_links_are_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path / ("victim" if name == "a" else "nowhere"))
        with pytest.raises(FileExistsError), new_file(tmp_path / name) as unfinished:
            unfinished.write_bytes(b"new")
        with pytest.raises(FileExistsError), new_folder(tmp_path / name):
            pass
    with new_file(tmp_path / "a", replace=True) as unfinished:
        unfinished.write_bytes(b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_file(umask: int, tmp_path: Path) -> None:
    def private(path: Path) -> None:
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    writers: tuple[Callable[[Path], object], ...] = (lambda path: path.write_bytes(b"x"), private)
    before = os.umask(umask)
    try:
        for i, write in enumerate(writers):
            with new_file(tmp_path / str(i)) as unfinished:
                write(unfinished)
        with new_folder(tmp_path / "folder") as made:
            (made / "file").touch()
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("0", "1", "folder/file")} == {0o666 & ~umask}
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.fault(110)
def test_other_threads_never_see_another_umask(tmp_path: Path) -> None:
    """Files that another thread makes while we write have the user's permissions, every one of them."""
    stop, modes = threading.Event(), set[int]()

    def others() -> None:
        count = 0
        while not stop.is_set():
            path = tmp_path / f"other-{count}"
            path.touch()
            modes.add(path.stat().st_mode & 0o777)
            count += 1

    before = os.umask(0o027)
    thread = threading.Thread(target=others)
    thread.start()
    try:
        for i in range(300):
            with new_file(tmp_path / f"ours-{i}") as unfinished:
                unfinished.write_bytes(b"x")
    finally:
        stop.set()
        thread.join()
        os.umask(before)
    assert modes == {0o640}


@pytest.mark.fault(117)
def test_without_hard_links_the_name_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    with new_file(tmp_path / "a") as unfinished:
        unfinished.write_bytes(b"x")
    with pytest.raises(FileExistsError), new_file(tmp_path / "a") as unfinished:
        unfinished.write_bytes(b"y")
    assert (left(tmp_path), (tmp_path / "a").read_bytes()) == (["a"], b"x")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no hard links"), new_file(tmp_path / "b") as unfinished:
        unfinished.write_bytes(b"y")
    assert left(tmp_path) == ["a"]


def test_a_long_name_has_room_for_its_unfinished_file(tmp_path: Path) -> None:
    name = "ä" * 120 + ".txt"
    with new_file(tmp_path / name) as unfinished:
        unfinished.write_bytes(b"x")
    with new_folder(tmp_path / ("ö" * 120)):
        pass
    assert len(left(tmp_path)) == 2
