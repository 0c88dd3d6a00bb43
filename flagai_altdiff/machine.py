"""How much main memory this process can have, and still can: the machine's, its containers' limits, its own limits.

And how it gives back what it no longer needs.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

MEMORY_MODES = ("auto", "normal", "low", "lowest")
"""How much memory drawing may take: what fits, as much as makes it quick, a part of a model at a time, a layer."""


@dataclass(frozen=True)
class _ControlGroups:
    """The names that one version of Linux's control groups has: files of a group, and a line of its ``memory.stat``."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str


_VERSIONS = {
    "cgroup2": _ControlGroups(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": _ControlGroups(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}
"""By the type of their file system."""


def free_main_memory(root: Path = Path("/")) -> float:
    """Bytes that this process can still have by the smallest limit; NaN where nothing is known. Never raises.

    Args:
        root: Folder in which ``proc`` and the control groups' mount points are.
    """
    groups = [left for group, names in _groups(root) for left in _left_by(group, names)]
    found = [*_machine(root), *groups, *(limit - used for limit, used in _process(root))]
    return max(0.0, min(found)) if found else math.nan


def total_main_memory(root: Path = Path("/")) -> float:
    """Bytes that this process could have by the smallest limit, were nothing in use; arguments and NaN as above."""
    groups = [limit for group, names in _groups(root) for limit in _limits_of(group, names)]
    found = [*_whole_machine(root), *groups, *(limit for limit, _ in _process(root))]
    return min(found) if found else math.nan


def give_back_memory() -> None:
    """Hand memory that was freed back to the system, where the C library can.

    Batches of many sizes leave gaps between what is kept, such as oneDNN's compiled kernels; without this a process
    that draws for days grows to several times its size.
    """
    with suppress(OSError, AttributeError, TypeError):  # glibc has it, others do not
        ctypes.CDLL(None).malloc_trim(0)


def _machine(root: Path) -> Iterator[float]:
    available = _field(root / "proc/meminfo", "MemAvailable")
    if available is not None:
        yield available * 1024
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        yield float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _whole_machine(root: Path) -> Iterator[float]:
    total = _field(root / "proc/meminfo", "MemTotal")
    if total is not None:
        yield total * 1024
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        yield float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _groups(root: Path) -> Iterator[tuple[Path, _ControlGroups]]:
    """The folder of each control group of the process, from its own up to the root."""
    own = dict(_own_groups(root))
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, version, options = mount.split(" "), kind.partition(" ")[0], kind.rpartition(" ")[2].split(",")
        if len(fields) > 4 and version in own and (version == "cgroup2" or "memory" in options):
            place = root / _unescaped(fields[4]).lstrip("/")
            for group in _from_own_to_root(own[version], _unescaped(fields[3])):
                yield place / group, _VERSIONS[version]


def _own_groups(root: Path) -> Iterator[tuple[str, str]]:
    """The process's group by version, as the kernel names it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            yield "cgroup2", group
        elif "memory" in controllers.split(","):
            yield "cgroup", group


def _from_own_to_root(group: str, mounted: str) -> Iterator[PurePosixPath]:
    """A group and those that it is in, seen from a mount point that shows the group ``mounted`` and what is in it."""
    path, shown = PurePosixPath(group), PurePosixPath(mounted)
    inside = path.relative_to(shown) if path.is_relative_to(shown) and ".." not in path.parts else PurePosixPath()
    yield from (inside, *inside.parents)


def _limits_of(group: Path, names: _ControlGroups) -> Iterator[float]:
    found = (_number(_text(group / name)) for name in names.limits)
    yield from (limit for limit in found if limit is not None)


def _left_by(group: Path, names: _ControlGroups) -> Iterator[float]:
    used = _number(_text(group / names.usage)) or 0.0
    used -= min(used, _field(group / "memory.stat", names.reclaimable) or 0.0)
    yield from (limit - used for limit in _limits_of(group, names))


def _process(root: Path) -> Iterator[tuple[float, float]]:
    """The process's own limits, with what is used of each."""
    if resource is None:
        return
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            yield float(most), 1024 * (_field(root / "proc/self/status", used) or 0.0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _number(text: str) -> float | None:
    """A number of bytes; ``None`` for ``max`` and whatever else is no number."""
    return float(text) if re.fullmatch(r"\s*[0-9]{1,20}\s*", text) else None


def _field(path: Path, name: str) -> float | None:
    """A number in a file of lines ``name value`` or ``name: value kB``."""
    found = re.search(rf"^{name}:?[ \t]+([0-9]{{1,20}})\b", _text(path), re.MULTILINE)
    return float(found[1]) if found else None


def _unescaped(text: str) -> str:
    """The kernel writes blanks in paths as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
