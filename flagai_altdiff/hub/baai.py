"""BAAI's model hub: looks a model up by name, lists its files, gives an address per file.

**Source**: the requests of FlagAI 1.8's downloader (the misspelt path is the hub's own).
"""

from __future__ import annotations

import ast
import json
import re
from functools import partial
from urllib.parse import urlencode

from flagai_altdiff.errors import ModelNotFoundError
from flagai_altdiff.hub.addresses import check_url, first_line, redact_url
from flagai_altdiff.hub.client import Answer, ask
from flagai_altdiff.hub.environment import baai_endpoint
from flagai_altdiff.hub.remote import Location, RemoteFile, check_size

MAX_LIST_CHARACTERS = 1 << 16
MISSING_FILE = "40002"


def list_files(name: str, revision: str | None = None) -> list[RemoteFile]:
    """The files of the model called ``name``, without sizes: the hub tells them with the address; no revisions."""
    if revision is not None:
        raise ModelNotFoundError(f"BAAI's hub has no revisions, so not {revision!a} of {name} either.")
    query = urlencode({"model_name": name})
    found = ask("GET", f"{baai_endpoint()}/api/searchModleByName?{query}")
    model_id = found.text.strip()
    if model_id == "null":
        raise ModelNotFoundError(f"{redact_url(found.url)}: there is no model {name!r}.")
    if not re.fullmatch(r'"?[\w-]{1,64}"?', model_id, re.ASCII):
        raise found.unusable("a model id")
    listed = ask("GET", f"{baai_endpoint()}/api/searchModelFileByName?{query}")
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
        raise answer.unusable("a list of files")
    return names


def _locate(model_id: str, file: str) -> Location:
    body = {"model_id": model_id, "checkpoint_name": file}
    answer = ask("POST", f"{baai_endpoint()}/api/downloadCode", body=body)
    fields = answer.parse_json()
    if not isinstance(fields, dict):
        raise answer.unusable("an object")
    if str(fields.get("code")) == MISSING_FILE:
        known = fields.get("files")
        tail = f" It has {first_line(', '.join(map(str, known)))}." if isinstance(known, list) else ""
        raise ModelNotFoundError(f"{redact_url(answer.url)}: there is no file {file!a}.{tail}")
    url, size = fields.get("url"), check_size(fields.get("size"))
    if not isinstance(url, str) or size is None:
        raise answer.unusable(f"url and size of {file!a}")
    check_url(url)
    return Location(url=url, size_bytes=size)
