"""BAAI's model hub: looks a model up by name, lists its files, gives an address per file.

**Source**: the requests of FlagAI 1.8's downloader (the misspelt path is the hub's own).
"""

from __future__ import annotations

import ast
import json
import re
from functools import partial

from flagai_altdiff.errors import HubError, ModelNotFoundError
from flagai_altdiff.hub.client import Answer, ask, check_scheme, first_line, shown
from flagai_altdiff.hub.environment import baai_endpoint
from flagai_altdiff.hub.remote import Location, RemoteFile

MAX_LIST_CHARACTERS = 1 << 16
MISSING_FILE = "40002"


def list_files(name: str, revision: str | None = None) -> list[RemoteFile]:
    """The files of the model called ``name``, without sizes: the hub tells them with the address. It has no revisions."""
    if revision is not None:
        raise ModelNotFoundError(f"BAAI's hub has no revisions, so not {revision!a} of {name} either.")
    found = ask("GET", f"{baai_endpoint()}/api/searchModleByName", params={"model_name": name})
    model_id = found.text.strip()
    if model_id == "null":
        raise ModelNotFoundError(f"{shown(found.url)}: there is no model {name!r}.")
    if not re.fullmatch(r'"?[\w-]{1,64}"?', model_id, re.ASCII):
        raise HubError(f"{shown(found.url)} answered with something that is not a model id: {first_line(found.text)}")
    listed = ask("GET", f"{baai_endpoint()}/api/searchModelFileByName", params={"model_name": name})
    return [RemoteFile(name=file, locate=partial(_locate, model_id, file)) for file in _parse_names(listed)]


def _parse_names(answer: Answer) -> list[str]:
    """The list of names, written as JSON or as a Python literal."""
    names: object = None
    if len(answer.text) <= MAX_LIST_CHARACTERS:
        try:
            names = json.loads(answer.text)
        except (ValueError, RecursionError):
            try:
                names = ast.literal_eval(answer.text.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise HubError(f"{shown(answer.url)} answered with something that is not a list of files: {first_line(answer.text)}")
    return names


def _locate(model_id: str, file: str) -> Location:
    body = {"model_id": model_id, "checkpoint_name": file}
    answer = ask("POST", f"{baai_endpoint()}/api/downloadCode", body=body)
    fields = answer.parse_json()
    if not isinstance(fields, dict):
        raise HubError(f"{shown(answer.url)} answered with something that is not an object: {first_line(answer.text)}")
    if str(fields.get("code")) == MISSING_FILE:
        known = fields.get("files")
        tail = f" It has {first_line(', '.join(map(str, known)))}." if isinstance(known, list) else ""
        raise ModelNotFoundError(f"{shown(answer.url)}: there is no file {file!a}.{tail}")
    url, size = fields.get("url"), fields.get("size")
    if not isinstance(url, str) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise HubError(f"{shown(answer.url)} answered without url and size for {file!a}: {first_line(answer.text)}")
    check_scheme(url)
    return Location(url=url, size_bytes=size)
