"""BAAI's model hub: looks a model up by name, lists its files, gives an address per file.

**Source**: the requests of FlagAI 1.8's downloader (the misspelt path is the hub's own).
"""

from __future__ import annotations

import json
import re
from functools import partial
from urllib.parse import urlencode

from flagai_altdiff.errors import ModelNotFoundError, shown
from flagai_altdiff.hub.addresses import check_url, redact_url
from flagai_altdiff.hub.client import Answer, ask
from flagai_altdiff.hub.environment import baai_endpoint
from flagai_altdiff.hub.remote import Location, RemoteFile, check_size

MAX_LIST_CHARACTERS = 1 << 16
MAX_FILES = 1000
"""Each is asked for by itself."""
MISSING_FILE = "40002"


def list_files(name: str, revision: str | None = None) -> list[RemoteFile]:
    """The files of the model called ``name``, without sizes: the hub tells them with the address; no revisions."""
    if revision is not None:
        raise ModelNotFoundError(f"BAAI's hub has no revisions, so not {shown(revision)} of {name} either.")
    query = urlencode({"model_name": name})
    found = ask("GET", f"{baai_endpoint()}/api/searchModleByName?{query}")
    model_id = found.text.strip()
    if model_id == "null":
        raise ModelNotFoundError(f"{redact_url(found.url)}: there is no model {shown(name)}.")
    if not re.fullmatch(r'"?[\w-]{1,64}"?', model_id, re.ASCII):
        raise found.unusable("a model id")
    listed = ask("GET", f"{baai_endpoint()}/api/searchModelFileByName?{query}")
    return [RemoteFile(name=file, locate=partial(_locate, model_id, file)) for file in _parse_names(listed)]


def _parse_names(answer: Answer) -> list[str]:
    """The list of names, written as JSON or as a Python literal; each once."""
    names = _as_json(answer.text) if len(answer.text) <= MAX_LIST_CHARACTERS else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > MAX_FILES:
        raise answer.unusable(f"a list of files, {MAX_FILES} at most")
    return list(dict.fromkeys(names))


def _as_json(text: str) -> object:
    """What a text is as JSON; of Python's literals, a list of plain texts is understood too."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        inside = re.fullmatch(r"\[([^\[\]]*)\]", text.strip())
    items = inside[1].strip().removesuffix(",").split(",") if inside else []
    texts = [re.fullmatch(r"""'([^'\\]*)'|"([^"\\]*)\"""", item.strip()) for item in items]
    return [match[1] or match[2] for match in texts if match] if texts and all(texts) else None


def _locate(model_id: str, file: str) -> Location:
    body = {"model_id": model_id, "checkpoint_name": file}
    hub = baai_endpoint()
    answer = ask("POST", f"{hub}/api/downloadCode", body=body)
    fields = answer.parse_json()
    if not isinstance(fields, dict):
        raise answer.unusable("an object")
    if fields.get("code") in (MISSING_FILE, int(MISSING_FILE)):
        known = fields.get("files")
        tail = f" It has {shown(known, 120)}." if isinstance(known, list) else ""
        raise ModelNotFoundError(f"{redact_url(answer.url)}: there is no file {shown(file)}.{tail}")
    url, size = fields.get("url"), check_size(fields.get("size"))
    if not isinstance(url, str) or size is None:
        raise answer.unusable(f"url and size of {shown(file)}")
    check_url(url)
    return Location(url=url, size_bytes=size, named_by=hub)
