"""What the kernel says about a file or block device: sizes, alignments, abilities. Touches what it is asked about."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import stat
import sys
from typing import Final

BLKROGET: Final = 0x125E
BLKSSZGET: Final = 0x1268
BLKIOMIN: Final = 0x1278
BLKIOOPT: Final = 0x1279
BLKPBSZGET: Final = 0x127B
BLKGETSIZE64: Final = 0x80081272

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

STATX_DIOALIGN: Final = 0x2000
AT_EMPTY_PATH: Final = 0x1000
_STATX_BYTES: Final = 256
_DIO_MEMORY: Final = slice(152, 156)
_DIO_OFFSET: Final = slice(156, 160)

_libc = ctypes.CDLL(None, use_errno=True)


def block_device_size(fd: int) -> int:
    """The size of a block device in bytes."""
    return _ioctl(fd, BLKGETSIZE64, "Q")


def block_device_number(fd: int, request: int) -> int:
    """What one of the ``BLK…GET`` requests answers, in bytes."""
    return _ioctl(fd, request, "I")


def queue_number(fd: int, name: str) -> int | None:
    """A number from the request queue of the block device ``fd``, or of the one that its file lies on.

    None when there is none to ask. The whole disk answers for a partition.
    """
    status = os.fstat(fd)
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    root = os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for place in (root, os.path.dirname(root)):
        try:
            with open(f"{place}/queue/{name}") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return None


def direct_alignment(fd: int) -> tuple[int, int]:
    """(memory, offset) alignment in bytes that direct I/O on ``fd`` demands.

    Asks statx; before Linux 6.1, and where a file system does not say, the logical block size of the device below, and
    4096 when there is no such device.
    """
    told = _statx_alignment(fd)
    if told is not None:
        return told
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        size = block_device_number(fd, BLKSSZGET)
    else:
        size = queue_number(fd, "logical_block_size") or 4096
    return size, size


def can_punch_holes(fd: int, *, beyond: int = 0) -> bool:
    """Whether the file system can deallocate a part of the writable file ``fd``, found out ``beyond`` its end."""
    place = (os.fstat(fd).st_size // 4096 + 1) * 4096 + beyond
    return _fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, place, 4096) == 0


def can_zero_ranges(path: str) -> bool:
    """Whether the file system that holds ``path`` can zero a part of a file by itself.

    Found out with a nameless file beside it, since zeroing allocates; where none can be made the answer is no.
    """
    try:
        fd = os.open(os.path.dirname(os.path.realpath(path)), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        os.ftruncate(fd, 4096)
        return _fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0, 4096) in (0, errno.ENOSPC, errno.EDQUOT)
    except OSError:
        return False
    finally:
        os.close(fd)


def _ioctl(fd: int, request: int, code: str) -> int:
    answer = array.array(code, [0])
    fcntl.ioctl(fd, request, answer, True)
    return int(answer[0])


def _statx_alignment(fd: int) -> tuple[int, int] | None:
    if not hasattr(_libc, "statx"):
        return None
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(ctypes.c_int(fd), b"", AT_EMPTY_PATH, STATX_DIOALIGN, buffer) != 0:
        return None
    answer = buffer.raw
    if not int.from_bytes(answer[:4], sys.byteorder) & STATX_DIOALIGN:
        return None
    memory = int.from_bytes(answer[_DIO_MEMORY], sys.byteorder)
    offset = int.from_bytes(answer[_DIO_OFFSET], sys.byteorder)
    return (memory, offset) if memory and offset else None


def _fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    call = _libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return 0 if call(fd, mode, offset, length) == 0 else ctypes.get_errno()
