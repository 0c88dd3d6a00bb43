"""docs/performance.md: its chapters are written by what measures them, each between marks of its own."""

from __future__ import annotations

from pathlib import Path

from flagai_altdiff.files import new_file

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "performance.md"


def between(page: str, chapter: str) -> tuple[str, str, str]:
    """A page cut in three: up to a chapter's first mark, the chapter, and from its last mark on.

    Raises:
        ValueError: It has no such marks.
    """
    first, last = (f"<!-- {chapter}: {edge} -->" for edge in ("begin", "end"))
    head, begin, rest = page.partition(first)
    content, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {first} and {last}")
    return head + begin, content.strip(), end + tail


def written(page: str, chapter: str, content: str) -> str:
    """The page with a chapter replaced; all else stays."""
    head, _, tail = between(page, chapter)
    return f"{head}\n\n{content}\n\n{tail}"


def chapter_of(chapter: str, path: Path = PAGE) -> str:
    """What a chapter has now."""
    return between(path.read_text(encoding="utf-8"), chapter)[1]


def write_chapter(chapter: str, content: str, path: Path = PAGE) -> None:
    """Put a chapter in the place of an earlier one."""
    text = written(path.read_text(encoding="utf-8"), chapter, content)
    with new_file(path, replace=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
