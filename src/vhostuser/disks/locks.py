"""Locks that keep two programs from writing one image. Touches the descriptor it is given.

The protocol is the one of QEMU's tools, so that each side sees the other: who opens an image holds a shared
open-file-description lock on one byte for each permission it uses (100 and up) and on one byte for each permission it
grants to nobody else (200 and up), and looks whether another one holds the opposite byte.

The locks are the fence between a server and its successor, too: they belong to the open file that every worker shares
and that every request inside the kernel holds, so they end when the last of those has ended, and not with the process.
Who only reads shares the image with other readers, but a late read writes into the memory of a guest: readers that
serve on the same place therefore wait for each other, by a byte that stands for the place.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
import zlib
from enum import IntEnum
from typing import Final

from vhostuser.errors import OperatorError

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, len, pid
USED: Final = 100
NOT_SHARED: Final = 200


class Permission(IntEnum):
    """What a program does with an image, by its number in the lock bytes."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


READING: Final = frozenset({Permission.CONSISTENT_READ})
WRITING: Final = frozenset(Permission)
EXCLUSIVE: Final = frozenset({Permission.WRITE, Permission.RESIZE})
"""What we let nobody else do, whether we write or only read."""


PLACES: Final = 1 << 30
"""The first of as many bytes, one of which stands for the place that a reader serves on."""

QUIET_S: Final = 1.0
"""How long to wait for a predecessor without a word: a killed one has let go by then unless its storage hangs."""
FIRST_PAUSE_S: Final = 0.001
PAUSE_S: Final = 0.02

log = logging.getLogger(__name__)


class Patience:
    """Waits for whoever has an image to let go of it: without a word for a second, then with one line in the log."""

    def __init__(self, path: str, limit_s: float) -> None:
        """``limit_s``: how long all the waiting may take; 0 tries once."""
        self._path = path
        self._begun = time.monotonic()
        self._limit_s = limit_s
        self._pause_s = FIRST_PAUSE_S
        self._told = False

    def lasts(self, cause: str) -> bool:
        """Whether to try once more, after a little while in which it blocks. ``cause``: what stands in the way."""
        waited = time.monotonic() - self._begun
        if waited >= self._limit_s:
            return False
        if waited >= QUIET_S and not self._told:
            self._told = True
            log.warning("%s: waiting up to %g s for it: %s", self._path, self._limit_s, cause)
        time.sleep(min(self._pause_s, self._limit_s - waited))
        self._pause_s = min(2 * self._pause_s, PAUSE_S)
        return True


def lock_image(fd: int, path: str, *, writable: bool, patience: Patience | None = None, place: str = "") -> None:
    """Lock the image behind ``fd`` for us, or raise `OperatorError` when another program uses it.

    Blocks for as long as ``patience`` lasts, a second when there is none. The lock belongs to the open file
    description: it ends when ``fd``, its duplicates and the requests inside the kernel have all ended. ``place``: what
    a reader serves on, if anything.
    """
    patience = patience or Patience(path, QUIET_S)
    try:
        while (conflict := _try_to_lock(fd, writable=writable, place=place)) is not None:
            if not patience.lasts(conflict):
                raise OperatorError(path, conflict, ADVICE)
    except OSError as error:
        unlock_image(fd)
        raise OperatorError(
            path,
            f"its file system cannot lock it ({os.strerror(error.errno or 0)})",
            "Serve it without locking (--no-lock) and make sure that nothing else uses it",
        ) from error


ADVICE: Final = (
    "Stop the other program, or serve the image read-only (--read-only) or without locking (--no-lock) "
    "if you know that only one of them writes"
)


def _try_to_lock(fd: int, *, writable: bool, place: str) -> str | None:
    """Hold every lock, or none: then what is in the way."""
    used = WRITING if writable else READING
    held = [USED + permission for permission in used] + [NOT_SHARED + permission for permission in EXCLUSIVE]
    opposite = [(NOT_SHARED + permission, _in_use(permission, False)) for permission in used]
    opposite += [(USED + permission, _in_use(permission, True)) for permission in EXCLUSIVE]
    if place:
        byte = PLACES + zlib.crc32(place.encode(errors="surrogateescape")) % PLACES
        held.append(byte)
        opposite.append((byte, f"another program serves it on {place}"))
    for byte in held:
        try:
            fcntl.fcntl(fd, F_OFD_SETLK, _lock(fcntl.F_RDLCK, byte))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            unlock_image(fd)
            return _in_use(Permission.WRITE, True)
    for byte, cause in opposite:
        if _taken(fd, byte):
            unlock_image(fd)
            return cause
    return None


def unlock_image(fd: int) -> None:
    """Drop every lock that `lock_image` made through this open file description, and ignore that there is none."""
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, USED, 2 * PLACES - USED, 0))
    except OSError:
        return


def _lock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _taken(fd: int, byte: int) -> bool:
    found = fcntl.fcntl(fd, F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _in_use(permission: Permission, uses: bool) -> str:
    right = permission.name.lower().replace("_", " ")
    if uses:
        return f"another program has it open with the {right} permission"
    return f"another program lets nobody else have its {right} permission"
