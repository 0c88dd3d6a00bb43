"""Large files mapped into memory, so that a number is read when it is first looked at.

A file that is emptied to be written anew takes the numbers away from whoever has it mapped, and the system ends a
process that looks at them then. So a model that a program gets has copies, unless it asks otherwise.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import weakref
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_WORTH_MAPPING_BYTES = 64 << 20
"""A smaller file is read in a few hundredths of a second, and is free to be replaced from then on."""
_DISTANT = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|ceph|afs|lustre|glusterfs|beegfs|gpfs|pvfs2|orangefs|virtiofs|vboxsf|prl_fs|vmhgfs|fuse(\..+)?"
)
"""File systems that ask another machine or program for every few pages of a mapped file, far slower than reading."""
_MOUNTS = Path("/proc/self/mountinfo")
_mappings: weakref.WeakKeyDictionary[mmap.mmap, range] = weakref.WeakKeyDictionary()
"""Mappings that are still looked at, and their addresses."""


def map_file(file: BinaryIO, where: str) -> mmap.mmap | None:
    """An open file mapped into memory, so that its numbers are read when they are first looked at.

    Args:
        file: Open for reading; may be closed afterwards.
        where: The file, for the log.

    Returns:
        The mapping; ``None`` where the file is better read: it is small, lies on a distant disk or cannot be mapped.
    """
    found = os.fstat(file.fileno())
    if found.st_size < _WORTH_MAPPING_BYTES:
        return None
    kind = _file_system(found.st_dev)
    if _DISTANT.fullmatch(kind):
        logger.info("%s lies on a distant disk (%s): read into memory", where, kind)
        return None
    try:
        mapping = mmap.mmap(file.fileno(), found.st_size, access=mmap.ACCESS_COPY)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        logger.info("%s cannot be mapped (%s): read into memory", where, error.strerror)
        return None
    start = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    _mappings[mapping] = range(start, start + found.st_size)
    return mapping


def _file_system(device: int) -> str:
    """Name of the file system of a device number, as Linux tells it; empty where nothing tells."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = (line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2:3] == [number])
    return next(kinds, "")


def is_mapped(tensor: Tensor) -> bool:
    """Whether the numbers are a part of a file mapped here."""
    return tensor.device.type == "cpu" and any(tensor.data_ptr() in addresses for addresses in list(_mappings.values()))


def let_go(tensor: Tensor) -> None:
    """Give back the memory of a mapped tensor that is not needed any more; it would be read from the file again.

    A tensor that was written into is kept: its numbers are nowhere else.
    """
    if tensor._version == 0:
        _advise(tensor, "MADV_DONTNEED")


def fetch(tensor: Tensor) -> None:
    """Have the system read a mapped tensor from its file meanwhile, before it is looked at."""
    _advise(tensor, "MADV_WILLNEED")


def _advise(tensor: Tensor, advice: str) -> None:
    """Tell the system what becomes of the pages that lie wholly in a mapped tensor, where it listens."""
    for mapping, addresses in list(_mappings.items()):
        if tensor.data_ptr() in addresses and tensor.is_contiguous() and hasattr(mmap, advice):
            start = tensor.data_ptr() - addresses.start
            first, last = -(-start // mmap.PAGESIZE), (start + tensor.nbytes) // mmap.PAGESIZE
            if last > first:
                mapping.madvise(getattr(mmap, advice), first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)
