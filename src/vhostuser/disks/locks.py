"""Locks that keep two programs from writing one image. Touches the descriptor it is given.

The protocol is the one of QEMU's tools, so that each side sees the other: who opens an image holds a shared
open-file-description lock on one byte for each permission it uses (100 and up) and on one byte for each permission it
grants to nobody else (200 and up), and looks whether another one holds the opposite byte.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
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


PATIENCE_S: Final = 1.0
"""How long to wait for a predecessor that was killed: its locks last until the kernel has ended its last request."""
RETRY_S: Final = 0.02


def lock_image(fd: int, path: str, *, writable: bool, patience_s: float = PATIENCE_S) -> None:
    """Lock the image behind ``fd`` for us, or raise `OperatorError` when another program uses it.

    Blocks for ``patience_s`` at most. The lock belongs to the open file description: it ends when ``fd``, its
    duplicates and the requests inside the kernel have all ended.
    """
    deadline = time.monotonic() + patience_s
    try:
        while (conflict := _try_to_lock(fd, writable=writable)) is not None:
            if time.monotonic() >= deadline:
                raise _in_use(path, *conflict)
            time.sleep(RETRY_S)
    except OSError as error:
        unlock_image(fd)
        raise OperatorError(
            path,
            f"its file system cannot lock it ({os.strerror(error.errno or 0)})",
            "Serve it without locking (--no-lock) and make sure that nothing else uses it",
        ) from error


def _try_to_lock(fd: int, *, writable: bool) -> tuple[Permission, bool] | None:
    """Hold every lock, or none: then the permission in dispute, and whether the other one uses it or withholds it."""
    used = WRITING if writable else READING
    held = [USED + permission for permission in used] + [NOT_SHARED + permission for permission in EXCLUSIVE]
    opposite = [(NOT_SHARED + permission, permission) for permission in used]
    opposite += [(USED + permission, permission) for permission in EXCLUSIVE]
    for byte in held:
        try:
            fcntl.fcntl(fd, F_OFD_SETLK, _lock(fcntl.F_RDLCK, byte))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            unlock_image(fd)
            return Permission.WRITE, True
    for byte, permission in opposite:
        if _taken(fd, byte):
            unlock_image(fd)
            return permission, byte < NOT_SHARED
    return None


def unlock_image(fd: int) -> None:
    """Drop every lock that `lock_image` made through this open file description, and ignore that there is none."""
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, USED, NOT_SHARED - USED + 64, 0))
    except OSError:
        return


def _lock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _taken(fd: int, byte: int) -> bool:
    found = fcntl.fcntl(fd, F_OFD_GETLK, _lock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _in_use(path: str, permission: Permission, writes: bool) -> OperatorError:
    right = permission.name.lower().replace("_", " ")
    does = f"has it open with the {right} permission" if writes else f"lets nobody else have its {right} permission"
    return OperatorError(
        path,
        f"another program {does}",
        "Stop the other program, or serve the image read-only (--read-only) or without locking (--no-lock) "
        "if you know that only one of them writes",
    )
