"""Files of prompts: text with a prompt per line, in the encodings that editors write; or JSON Lines, a request each."""

from __future__ import annotations

import codecs
import difflib
import json
import re
import shlex
from pathlib import Path, PurePath
from typing import Any

from flagai_altdiff.errors import InvalidRequestError, shown

INVISIBLE = " \t\x0b\x0c\x1a\xa0\u200b\u2060\u3000"
"""A line of these is blank; DOS ended its files with one of them."""
_MAX_BYTES = 64 << 20


def read_prompt_file(path: str | Path, *, comments: bool = False) -> tuple[str, ...]:
    """The prompts of a file.

    Args:
        path: The file.
        comments: Whether lines that begin with ``#`` are left out.

    Raises:
        InvalidRequestError: It cannot be read, has another encoding (with the line), or no prompt in it.
    """
    return parse_prompts(_content(path), str(path), comments=comments)


def has_requests(path: str | Path) -> bool:
    """Whether a file is JSON Lines, by its name."""
    return PurePath(path).suffix.lower() in (".jsonl", ".ndjson")


def read_requests(path: str | Path, *, comments: bool = False) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file: for each line the options of a request, by name, ``prompt`` among them.

    Args:
        path: The file.
        comments: Whether lines that begin with ``#`` are left out.

    Raises:
        InvalidRequestError: It cannot be read, or a line is no object with a prompt; the message has its number.
    """
    found = []
    for number, line in enumerate(_text_of(_content(path), str(path)).split("\n"), 1):
        if not line.strip() or (comments and line.lstrip().startswith("#")):
            continue
        try:
            options = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError("from_file", str(path), f"line {number} is no JSON: {error}") from None
        if reason := why_no_request(options):
            raise InvalidRequestError("from_file", str(path), f"line {number}: {reason}")
        found.append(options)
    if not found:
        raise InvalidRequestError("from_file", str(path), "the file has no request; expected one on each line")
    return found


def why_no_request(found: object) -> str:
    """What is wrong with the JSON of a line, if it is no request."""
    if isinstance(found, dict) and {"prompt", "prompts"} & found.keys():
        return ""
    near = difflib.get_close_matches("prompt", found, n=1) if isinstance(found, dict) else ()
    guess = f"; it has {shown(near[0])}: did you mean 'prompt'?" if near else ""
    return 'it has no prompt; expected {"prompt": "a cat"} and other options of a request beside it' + guess


def _content(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:  # a pipe as well, as shells make them of <(command)
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB; expected a text with a prompt on each line")
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequestError("from_file", str(path), f"cannot be read: {reason}") from error
    return data


def parse_prompts(data: bytes, name: str, *, comments: bool = False) -> tuple[str, ...]:
    """The prompts of a text: one per line, blank lines skipped.

    Args:
        data: UTF-8 (with or without a byte order mark) or UTF-16 with one; lines end in LF, CRLF or CR.
        name: The file, for errors.
        comments: Whether lines that begin with ``#`` are left out.

    Raises:
        InvalidRequestError: Another encoding (with the line), or no prompt in it.
    """
    text = _text_of(data, name)
    # Files that were joined end to end have byte order marks inside.
    lines = (line.lstrip("\ufeff") for line in re.split(r"\r\n|\r|\n", text))
    seen = (line for line in lines if line.strip(INVISIBLE))
    prompts = tuple(line for line in seen if not (comments and line.lstrip().startswith("#")))
    if not prompts:
        raise InvalidRequestError("from_file", name, "the file has no prompt; expected one per line")
    return prompts


def _text_of(data: bytes, name: str) -> str:
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + len(re.findall(rb"\r\n|\r|\n", data[: error.start]))
        raise InvalidRequestError("from_file", name, f"line {line} is not UTF-8; {reencoding(data, name)}") from error
    if "\0" in text:
        raise InvalidRequestError("from_file", name, f"it has NUL characters; {reencoding(data, name)}")
    return text


def reencoding(data: bytes, name: str) -> str:
    """The command that makes a UTF-8 copy of a prompt file, with a guess at what it is now."""
    if b"\0" in data:
        guess = "UTF-16LE" if data.find(b"\0") % 2 else "UTF-16BE"
    else:  # letters of Chinese take two bytes each
        single = any(len(run) % 2 for run in re.findall(rb"[\x80-\xff]+", data))
        guess = "ISO-8859-1" if single else "GB18030"
    source, copy = shlex.quote(name), shlex.quote(str(PurePath(name).with_suffix(".utf8.txt")))
    return f"save it as UTF-8. If it is {guess}, as it seems: iconv -f {guess} -t UTF-8 {source} > {copy}"
