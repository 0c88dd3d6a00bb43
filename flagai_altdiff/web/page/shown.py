"""What the page shows of jobs and images. All that people or files have written is escaped."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flagai_altdiff.web.jobs import Job
from flagai_altdiff.web.messages import Drawn
from flagai_altdiff.web.page.texts import said

Shown = tuple[Any, str]
"""An image of a gallery, and what stands under it."""
_LONG = 2.0
_LONGEST_PROMPT = 200


def status_html(job: Job | None, position: int, language: str) -> str:
    """How far a job is, with its preview."""
    if job is None:
        return _status(said("idle", language))
    if job.state == "waiting":
        return _status(said("waiting", language, position=position))
    if job.state == "drawing":
        left = said("left", language, seconds=round(job.seconds_left)) if job.seconds_left else ""
        text = said("drawing", language, step=job.step, steps=job.steps or "?", left=left)
        bar = f'<progress max="{job.steps or 1}" value="{job.step}" aria-label="{escape(text)}"></progress>'
        return _status(text, bar + _preview(job.preview))
    if job.state == "done":
        seconds = f"{(job.ended or time.time()) - (job.began or job.created):.1f}"
        notes = "".join(f"<p>{escape(note)}</p>" for note in job.notes)
        return _status(said("done", language, seconds=seconds), notes)
    if job.state == "cancelled":
        return _status(said("cancelled", language))
    return error_html(job.problem.text if job.problem else job.state)


def error_html(text: str) -> str:
    """Something that went wrong."""
    return f'<div class="status error" role="alert">{escape(text)}</div>'


def _status(text: str, more: str = "") -> str:
    return f'<div class="status" role="status">{escape(text)}{more}</div>'


def _preview(jpeg: bytes | None) -> str:
    if jpeg is None:
        return ""
    return f'<img class="preview" alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def image_of(drawn: Drawn) -> Any:
    """An image as a gallery takes it."""
    if drawn.path is not None:
        return str(drawn.path)
    import io

    from PIL import Image

    return Image.open(io.BytesIO(drawn.png or b""))


def caption(record: Mapping[str, Any], language: str) -> str:
    """What stands under an image: its prompt and how it was made."""
    size = f"{record.get('width')}×{record.get('height')}"
    parts = [
        str(record.get("prompt", ""))[:_LONGEST_PROMPT],
        said("seed", language, seed=record.get("seed")),
        said("steps", language, steps=record.get("steps")),
        str(record.get("sampler", "")),
        size,
        str(record.get("model", "")),
        *(f"{name} {strength:g}" for name, strength in loras_of(record).items()),
    ]
    return " · ".join(part for part in parts if part)


def loras_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The LoRAs of an image and their strengths, as its record says; what is none is left out."""
    listed = record.get("loras")
    found = listed if isinstance(listed, list) else []
    pairs = [(own.get("name"), own.get("strength")) for own in found if isinstance(own, Mapping)]
    return {str(name): float(strength) for name, strength in pairs if name and isinstance(strength, int | float)}


def long_html(job: Job | None, language: str) -> str:
    """A viewer for an image that is much wider or higher than a screen; nothing for others."""
    images = [image for image in (job.images if job else ()) if max(image.size) >= _LONG * min(image.size)]
    if job is None or not images:
        return ""
    label = escape(said("long", language))
    source = f"/api/jobs/{job.id}/images/{images[0].index}"
    return f'<div class="long" tabindex="0" role="group" aria-label="{label}"><img alt="{label}" src="{source}"></div>'


def interrupted_html(jobs: Sequence[Mapping[str, Any]], language: str) -> str:
    """Jobs of an earlier server, by their prompts."""
    if not jobs:
        return ""
    prompts = [" | ".join(map(str, own.get("request", {}).get("prompts", ()))) for own in jobs]
    lines = "".join(f'<li dir="auto">{escape(prompt[:_LONGEST_PROMPT])}</li>' for prompt in prompts)
    return f'<p class="status">{escape(said("interrupted", language))}:</p><ul>{lines}</ul>'


def is_file(path: Path | None) -> bool:
    """Whether an image still lies where it was saved."""
    return path is not None and path.is_file()
