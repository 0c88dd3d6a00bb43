"""Messages quote what files and servers say: nothing that a terminal obeys, nothing endless; and the last net."""

from __future__ import annotations

import pytest

from flagai_altdiff.errors import (
    CheckpointError,
    DiskError,
    FlagAIAltDiffError,
    HubError,
    InsufficientMemoryError,
    InvalidRequestError,
    StateDictMismatchError,
    last_net,
    printable,
    shown,
)

NASTY = ["\x1b[2J", "\x9b31m", "\u202e", "\x00", "\r", "\ud800", "\u2028", "\x07"]


@pytest.mark.parametrize("char", NASTY)
def test_no_message_has_what_a_terminal_obeys(char: str) -> None:
    errors = [
        HubError(f"a{char}b"),
        DiskError(f"a{char}b", 5),
        CheckpointError(f"a{char}b"),
        InvalidRequestError("field", char, "something else"),
        StateDictMismatchError(f"a{char}b", [char], [char], {char: ((1,), (2,))}),
    ]
    for error in errors:
        assert all(c.isprintable() or c == "\n" for c in str(error))


def test_a_name_cannot_forge_a_line() -> None:
    assert printable("a\nFATAL: b") == "a\\nFATAL: b"
    assert "\n" not in str(StateDictMismatchError("x", ["a\nb"])) and "\n" not in shown({"a\nb": 1})


def test_readable_text_stays() -> None:
    assert str(HubError("no 猫 here,\ntry قط")) == "no 猫 here,\ntry قط"


def test_long_quotations_are_cut() -> None:
    key = "k" * 1_000_000
    assert len(str(StateDictMismatchError("x", [key] * 9, [key], {key: ((1,), (2,))}))) < 1000
    assert len(str(HubError(key))) < 10_000
    for value in (key, key.encode(), 10**100_000, [key] * 1000, {key: [key]}, (1,) * 1_000_000):
        assert len(shown(value)) < 120
    assert shown("ab") == "'ab'" and shown(b"\x1b") == r"b'\x1b'" and shown(None) == "None"
    assert printable("a" * 10, 5) == "aa..."


@pytest.mark.parametrize(
    "failure", [ValueError("x\ny"), KeyError(1), RecursionError(), OverflowError("y"), OSError(2, "no")]
)
def test_the_last_net_makes_an_error_of_ours(failure: Exception) -> None:
    with pytest.raises(HubError, match=r"^the file ") as caught, last_net("the file", HubError):
        raise failure
    assert caught.value.__cause__ is failure and "\n" not in str(caught.value)


def test_the_last_net_lets_pass_what_has_a_name() -> None:
    with pytest.raises(InsufficientMemoryError, match="the file"), last_net("the file"):
        raise MemoryError
    with pytest.raises(FlagAIAltDiffError, match=r"^as it was$"), last_net("the file"):
        raise HubError("as it was")
    with pytest.raises(KeyboardInterrupt), last_net("the file"):
        raise KeyboardInterrupt
