"""From the text of a command line to an open disk. Touches what the disks touch."""

from __future__ import annotations

import os
import re
from typing import Final

from vhostuser.disks.disk import Disk
from vhostuser.disks.file import CACHES, ENGINES, FileDisk
from vhostuser.disks.locks import QUIET_S
from vhostuser.disks.memory import MemoryDisk
from vhostuser.disks.null import NullDisk
from vhostuser.errors import UsageError

SUFFIXES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50, "E": 1 << 60}
MAX_SIZE: Final = (1 << 63) - 512
"""What a file offset can name, in whole sectors."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTPE]?)(?:i?B)?", re.IGNORECASE)
_KIND = re.compile(r"([a-z][a-z0-9-]*):(.*)", re.DOTALL)
_MADE: Final = {"memory": MemoryDisk, "null": NullDisk}


def parse_size(text: str) -> int:
    """Read a size in bytes like ``1G``, ``1.5T`` or ``512``: suffixes are powers of 1024.

    Raises `UsageError` for anything else, for a fraction of a byte and for more than a file can hold.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"size {text!r}", "this is not a size", "Write a number and K, M, G or T, like 10G")
    number, suffix = match[1], SUFFIXES[match[2].upper()]
    whole, _, fraction = number.partition(".")
    scaled, rest = divmod(int(fraction or 0) * suffix, 10 ** len(fraction))
    size: int = int(whole) * suffix + scaled
    if rest:
        raise UsageError(f"size {text!r}", "this is not a whole number of bytes", "Write it in a smaller unit")
    if size > MAX_SIZE:
        raise UsageError(f"size {text!r}", "no disk can be that large", "The most is just below 8E")
    return size


def open_disk(
    text: str, *, read_only: bool = False, cache: str = "writeback", engine: str = "auto",
    lock: bool = True, lock_timeout_s: float = QUIET_S, place: str = "", incoming: bool = False,
) -> Disk:  # fmt: skip
    """Open the disk that ``text`` names: a path, ``memory:size=1G`` or ``null:size=1T``.

    ``cache`` is "writeback", "writethrough" or "none"; ``engine`` ("auto", "io_uring", "syscalls"), ``lock``,
    ``lock_timeout_s``, ``place`` and ``incoming`` matter for files and block devices only, see `FileDisk`. Write
    ``./memory:x`` for a file of such a name. The caller closes the disk.
    Raises `UsageError` for a text or an option that makes no sense, `OperatorError` when storage cannot be served.
    """
    if cache not in CACHES:
        raise UsageError(f"cache {cache!r}", "there is no such mode", f"Use one of {', '.join(CACHES)}")
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r}", "there is no such engine", f"Use one of {', '.join(ENGINES)}")
    kind = _KIND.fullmatch(text)
    if kind is not None and kind[1] in _MADE:
        disk = _MADE[kind[1]](_size_option(text, kind[2]), read_only=read_only)
        disk.writeback = cache != "writethrough"
        return disk
    if kind is not None and not os.path.exists(text):
        raise UsageError(
            f"disk {text!r}",
            f"there is neither a file of this name nor a kind of disk called {kind[1]!r}",
            "Give a path, memory:size=1G or null:size=1T",
        )
    if not text:
        raise UsageError("disk", "the name is empty", "Give a path, memory:size=1G or null:size=1T")
    return FileDisk(
        text, read_only=read_only, cache=cache, engine=engine, lock=lock, lock_timeout_s=lock_timeout_s, place=place,
        incoming=incoming,
    )  # fmt: skip


def _size_option(text: str, options: str) -> int:
    key, _, value = options.partition("=")
    if key != "size" or not value:
        raise UsageError(f"disk {text!r}", "it says nothing of its size", f"Write {text.split(':', 1)[0]}:size=1G")
    return parse_size(value)
