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


def lock_image(fd: int, path: str, *, writable: bool) -> None:
    """Lock the image behind ``fd`` for us, or raise `OperatorError` when another program uses it.

    Never blocks. The lock belongs to the open file description: it ends when ``fd``, its duplicates and the requests
    inside the kernel have all ended.
    """
    used = WRITING if writable else READING
    held = [USED + permission for permission in used] + [NOT_SHARED + permission for permission in EXCLUSIVE]
    opposite = [(NOT_SHARED + permission, permission) for permission in used]
    opposite += [(USED + permission, permission) for permission in EXCLUSIVE]
    try:
        for byte in held:
            fcntl.fcntl(fd, F_OFD_SETLK, _lock(fcntl.F_RDLCK, byte))
        for byte, permission in opposite:
            if _taken(fd, byte):
                unlock_image(fd)
                raise _in_use(path, permission, writes=byte < NOT_SHARED)
    except OSError as error:
        unlock_image(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _in_use(path, Permission.WRITE, writes=True) from error
        raise OperatorError(
            path,
            f"its file system cannot lock it ({os.strerror(error.errno or 0)})",
            "Serve it without locking (--no-lock) and make sure that nothing else uses it",
        ) from error


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


def _in_use(path: str, permission: Permission, *, writes: bool) -> OperatorError:
    right = permission.name.lower().replace("_", " ")
    does = f"has it open with the {right} permission" if writes else f"lets nobody else have its {right} permission"
    return OperatorError(
        path,
        f"another program {does}",
        "Stop the other program, or serve the image read-only (--read-only) or without locking (--no-lock) "
        "if you know that only one of them writes",
    )
