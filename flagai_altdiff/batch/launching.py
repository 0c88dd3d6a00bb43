"""Processes on this machine, each for a device: started, watched, and started again where one is killed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

logger = logging.getLogger(__name__)

Member = Callable[..., tuple[int, str]]
"""What a process does with the arguments of :func:`launch`: gives a status, 0 where all is well, and its reason."""

RESTARTS = 3
"""How often a process that was killed is started again."""


@dataclass
class _Process:
    """A process, and where it says what is wrong."""

    number: int
    process: BaseProcess
    words: Connection
    restarts: int = field(default=0)


def launch(member: Member, count: int, *arguments: Any) -> dict[tuple[int, str], list[int]]:
    """Have processes do something, and wait for all of them.

    A process that is killed (by somebody, by want of memory) is started again, a few times; the others go on meanwhile.
    One that says what is wrong is not. The environment variable ``LOCAL_RANK`` tells each its number.

    Args:
        member: What each does; it must be a function of a module.
        count: How many there are.
        arguments: For ``member``; they are pickled.

    Returns:
        Status and reason -> the processes that failed for it; empty where all is well.
    """
    running = [_start(member, number, arguments) for number in range(count)]
    wrong: dict[tuple[int, str], list[int]] = {}
    try:
        while running:
            ended = wait([own.process.sentinel for own in running])
            for own in [own for own in running if own.process.sentinel in ended]:
                running.remove(own)
                status = _status(own)
                if status < 0 and own.restarts < RESTARTS:
                    name = signal.Signals(-status).name
                    logger.warning("process %d was killed (%s); it is started again", own.number, name)
                    running.append(_start(member, own.number, arguments, own.restarts + 1))
                elif (reason := _reason(own, status))[0]:
                    wrong.setdefault(reason, []).append(own.number)
    finally:
        _stop(running)
    return wrong


def has_parent(parent: int) -> bool:
    """Whether this process still has the one that started it."""
    return os.getppid() == parent


def _start(member: Member, number: int, arguments: tuple[Any, ...], restarts: int = 0) -> _Process:
    context = multiprocessing.get_context("spawn")
    words, said = context.Pipe(duplex=False)
    process = context.Process(target=_live, args=(member, number, said, arguments), daemon=True)
    process.start()
    said.close()
    return _Process(number, process, words, restarts)


def _live(member: Member, number: int, said: Connection, arguments: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(number)
    said.send(member(*arguments))


def _status(own: _Process) -> int:
    own.process.join()
    return own.process.exitcode or 0


def _reason(own: _Process, status: int) -> tuple[int, str]:
    """What a process said, or how it ended where it could say nothing."""
    try:
        code, text = own.words.recv()
        return code, text
    except EOFError:
        return (status, f"it ended with status {status}") if status >= 0 else (1, f"it was killed {RESTARTS + 1} times")
    finally:
        own.words.close()


def _stop(running: list[_Process]) -> None:
    for own in running:
        own.process.terminate()
    for own in running:
        own.process.join()
