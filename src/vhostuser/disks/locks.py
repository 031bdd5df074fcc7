"""Locks that keep two programs from writing one image. Touches the descriptor it is given.

The protocol is the one of QEMU's tools, so that each side sees the other: who opens an image holds a shared
open-file-description lock on one byte for each permission it uses (100 and up) and on one byte for each permission it
grants to nobody else (200 and up), and looks whether another one holds the opposite byte.

The locks are the fence between a server and its successor, too: they belong to the open file that every worker shares
and that every request inside the kernel holds, so they end when the last of those has ended, and not with the process.
Who only reads shares the image with other readers, but a late read writes into the memory of a guest: readers that
serve on the same place therefore wait for each other, by a byte that stands for the place.

Four bytes below those of QEMU are our own, for the hand-over of an image from one server to another (see
`vhostuser.disks.custody`).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
import zlib
from collections.abc import Collection
from enum import IntEnum
from typing import Final

from vhostuser.errors import OperatorError

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, len, pid
GIVEN: Final = 96
"""Held by a server that let go of the image for another one, until that one has it."""
LENDER: Final = 97
"""Held by a server that has the image and would hand it over."""
HEIR: Final = 98
"""Held, by one at a time, by the server that waits for the image."""
CACHE_OFF: Final = 99
"""Held by a server whose guest has its write cache off."""
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


def lock_image(
    fd: int, path: str, *, writable: bool, patience: Patience | None = None, place: str = "", heir: bool = False
) -> None:
    """Lock the image behind ``fd`` for us, or raise `OperatorError` when another program uses it.

    Blocks for as long as ``patience`` lasts, a second when there is none. The lock belongs to the open file
    description: it ends when ``fd``, its duplicates and the requests inside the kernel have all ended. ``place``: what
    a reader serves on, if anything. ``heir``: we have announced ourselves (`announce_heir`), and still do if it fails.
    """
    patience = patience or Patience(path, QUIET_S)
    try:
        while (conflict := _try_to_lock(fd, writable=writable, place=place, heir=heir)) is not None:
            if not patience.lasts(conflict):
                raise OperatorError(path, conflict, ADVICE)
    except OSError as error:
        unlock_image(fd)
        raise _unlockable(path, error) from error


def announce_heir(fd: int, path: str, patience: Patience) -> None:
    """Be the one who waits for the image: who has it lets go of it when it can, and nobody else gets it then.

    Raises `OperatorError` when another one waits already, or when a program has the image that hands nothing over.
    Blocks for as long as ``patience`` lasts.
    """
    try:
        while not hold(fd, HEIR, exclusive=True):
            if not patience.lasts("another server waits for it already"):
                raise OperatorError(path, "another server waits for it already (--incoming)", "Stop that one first")
        for byte in CLAIMED:
            hold(fd, byte)
        while (conflict := _conflict(fd, _opposite(WRITING))) is not None and not taken(fd, LENDER):
            if not patience.lasts(conflict):
                raise OperatorError(path, f"{conflict}, and will not hand it over", ADVICE)
    except OSError as error:
        raise _unlockable(path, error) from error


ADVICE: Final = (
    "Stop the other program, or serve the image read-only (--read-only) or without locking (--no-lock) "
    "if you know that only one of them writes"
)

CLAIMED: Final = tuple(NOT_SHARED + permission for permission in EXCLUSIVE)
"""What an heir holds while it waits: no other program begins to write, not even in the moment between the two."""


def _unlockable(path: str, error: OSError) -> OperatorError:
    return OperatorError(
        path,
        f"its file system cannot lock it ({os.strerror(error.errno or 0)})",
        "Serve it without locking (--no-lock) and make sure that nothing else uses it",
    )


def _try_to_lock(fd: int, *, writable: bool, place: str, heir: bool) -> str | None:
    """Hold every lock, or none but those of an heir: then what is in the way."""
    used = WRITING if writable else READING
    held = [USED + permission for permission in used] + list(CLAIMED)
    opposite = _opposite(used)
    if place:
        byte = PLACES + zlib.crc32(place.encode(errors="surrogateescape")) % PLACES
        held.append(byte)
        opposite.append((byte, f"another program serves it on {place}"))
    kept = CLAIMED if heir else ()
    for byte in held:
        if not hold(fd, byte):
            unlock_image(fd, but=kept)
            return _in_use(Permission.WRITE, True)
    conflict = _conflict(fd, opposite)
    if conflict is not None and not (_only_claimed(fd) and not heir):
        unlock_image(fd, but=kept)
        return conflict
    return None


def _opposite(used: frozenset[Permission]) -> list[tuple[int, str]]:
    """The bytes that nobody else may hold when we use these permissions, and what it means when one does."""
    opposite = [(NOT_SHARED + permission, _in_use(permission, False)) for permission in used]
    return opposite + [(USED + permission, _in_use(permission, True)) for permission in EXCLUSIVE]


def _conflict(fd: int, opposite: list[tuple[int, str]]) -> str | None:
    return next((cause for byte, cause in opposite if taken(fd, byte)), None)


def _only_claimed(fd: int) -> bool:
    """Whether it is just an heir that keeps others out, and who had the image has gone: then we are its successor."""
    return (
        taken(fd, HEIR) and not taken(fd, GIVEN) and not any(taken(fd, USED + permission) for permission in Permission)
    )


def unlock_image(fd: int, *, but: Collection[int] = ()) -> None:
    """Drop every lock that `lock_image` made through this open file description, and ignore that there is none.

    ``but``: bytes that stay locked.
    """
    start = USED
    for byte in [*sorted(but), 2 * PLACES]:
        drop(fd, start, byte - start)
        start = byte + 1


def hold(fd: int, byte: int, *, exclusive: bool = False) -> bool:
    """Lock one byte, with others or alone; False when others do not let us. Raises `OSError`."""
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, _lock(fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, byte))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def drop(fd: int, byte: int, length: int = 1) -> None:
    """Unlock ``length`` bytes from ``byte`` on, and ignore that there is nothing to unlock."""
    if not length:  # to the kernel that would be all up to the end
        return
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, length, 0))
    except OSError:
        return


def taken(fd: int, byte: int) -> bool:
    """Whether another open file description holds ``byte``. Raises `OSError`."""
    found = fcntl.fcntl(fd, F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _lock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _in_use(permission: Permission, uses: bool) -> str:
    right = permission.name.lower().replace("_", " ")
    if uses:
        return f"another program has it open with the {right} permission"
    return f"another program lets nobody else have its {right} permission"
