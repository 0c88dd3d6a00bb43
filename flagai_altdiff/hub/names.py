"""File names that a server sent: refused unless they stay inside one folder on every file system."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from flagai_altdiff.errors import HubError

MAX_NAME_BYTES = 255
STAGING_PREFIX = ".incoming-"
MANIFEST_NAME = "altdiff-manifest.json"
LOCK_NAME = ".altdiff.lock"
JOURNAL_NAME = "altdiff-journal.jsonl"
MAX_PATH_CHARACTERS = 1000
MAX_LEVELS = 16
PART_SUFFIX = ".part"
STATE_SUFFIX = ".part.json"

_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{d}{n}" for d in ("com", "lpt") for n in "123456789¹²³"
}
_FORBIDDEN = set('<>:"|?*\\')


def safe_name(text: str) -> PurePosixPath:
    """The relative path that ``text`` names.

    Args:
        text: Path with forward slashes, as a server sent it.

    Returns:
        The same path.

    Raises:
        HubError: It could leave the folder, is not portable between file systems, or is one that downloads use.
    """
    too_long = len(text) > MAX_PATH_CHARACTERS or text.count("/") >= MAX_LEVELS
    problems = [f"it has more than {MAX_PATH_CHARACTERS} characters or {MAX_LEVELS} levels"] if too_long else []
    for problem in problems or filter(None, map(_problem, text.split("/"))):
        raise HubError(f"refused the file name {text[:300]!a}: {problem}.")
    return PurePosixPath(text)


def safe_names(texts: Iterable[str]) -> list[PurePosixPath]:
    """:func:`safe_name` of each, refusing also two names that some file system would take for one."""
    paths, seen = [safe_name(text) for text in texts], dict[str, str]()
    for path in paths:
        other = seen.setdefault(_folded(path), str(path))
        if other != str(path):
            raise HubError(f"refused the file names {other!a} and {str(path)!a}: they differ in case only.")
    for folded, name in seen.items():
        for level in range(1, folded.count("/") + 1):
            if (parent := folded.rsplit("/", level)[0]) in seen:
                raise HubError(f"refused the file name {name!a}: {seen[parent]!a} is a file.")
    return paths


def _folded(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFKC", str(path)).casefold()


def _problem(part: str) -> str | None:
    if part in ("", ".", ".."):
        return "it is absolute, empty, or has '.' or '..' in it"
    if any(unicodedata.category(char)[0] == "C" or char in "\u2028\u2029" for char in part):
        return "it has control or invisible characters"
    if _FORBIDDEN & set(part):
        return "it has a drive letter, a backslash or another character that Windows forbids"
    if unicodedata.normalize("NFKC", part) != part:
        return "it has characters that look like others"
    if part != part.strip() or part.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    if part.split(".")[0].rstrip().casefold() in _DEVICES:
        return "it is a device on Windows"
    if len(part.encode()) > MAX_NAME_BYTES - len(STATE_SUFFIX):
        return f"it is longer than {MAX_NAME_BYTES - len(STATE_SUFFIX)} bytes"
    folded = part.casefold()
    if folded.startswith(STAGING_PREFIX) or folded.endswith((PART_SUFFIX, STATE_SUFFIX)):
        return "unfinished downloads have such names"
    if folded in (MANIFEST_NAME, LOCK_NAME, JOURNAL_NAME):
        return "downloads keep their own books under this name"
    return None
