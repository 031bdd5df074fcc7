"""A file or block device as an end of a copy. Touches that file, and a few threads that wait for it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from vhostuser.copying.sides import CHUNK, STEP, ZEROES, Piece, cut, done
from vhostuser.disks.locks import lock_image
from vhostuser.errors import OperatorError
from vhostuser.fds import Fd

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

THREADS: Final = 4


class FileSide:
    """The bytes of an open file from a position on. Holes are found, and made."""

    def __init__(self, name: str, fd: Fd, *, start: int = 0, replace: bool = False) -> None:
        """Takes ``fd``, of a regular file or block device. ``replace``: the file is to hold the copy and no more."""
        self.name: Final = name
        self.window: Final = THREADS
        self.grain: Final = 4096
        self.zero_step: Final = CHUNK
        self._fd = fd
        self._start = start
        self._replace = replace
        self._device = stat.S_ISBLK(os.fstat(fd.fileno()).st_mode)
        self._end = os.lseek(fd.fileno(), 0, os.SEEK_END)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="copy")
        self._sparse_from = max(self._end - start, 0)  # nothing is there from here on

    @classmethod
    def source(cls, path: str) -> FileSide:
        """Open a file to read from. Raises `OperatorError` when another program writes it, `OSError`."""
        return cls(path, _locked(path, os.O_RDONLY, writable=False))

    @classmethod
    def sink(cls, path: str) -> FileSide:
        """Open a file to write to, or make it; it keeps its content until `prepare`.

        Raises `OperatorError` when another program uses it, `OSError`.
        """
        exclusively = os.O_EXCL if _is_device(path) else os.O_CREAT
        return cls(path, _locked(path, os.O_RDWR | exclusively, writable=True), replace=not _is_device(path))

    @property
    def size(self) -> int:
        """From the position to the end of the file."""
        return max(self._end - self._start, 0)

    @property
    def capacity(self) -> int | None:
        """A device's end; a file grows."""
        return self.size if self._device else None

    @property
    def readable(self) -> bool:
        """Unless it was opened for writing only, as standard output is."""
        return fcntl.fcntl(self._fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY

    def same_as(self, other: FileSide) -> bool:
        """Whether both are one file."""
        return os.path.sameopenfile(self._fd.fileno(), other._fd.fileno())

    def pieces(self) -> Iterator[Piece]:
        """Data and holes in turn, as the file system tells them, in whole steps."""
        at, size = 0, self.size
        while at < size:
            data = self._seek(at, os.SEEK_DATA, size)
            end = self._seek(data, os.SEEK_HOLE, size) if data < size else size
            end = min(end + -end % STEP, size)
            start = data - data % STEP if data < size else size
            if start > at:
                yield at, start - at, False
            for part, length in cut(start, end - start, CHUNK):
                yield part, length, True
            at = end

    def begin(self, offset: int, length: int) -> Future[bytes]:
        """Read all of it; an `OSError` when the file has become shorter."""
        return self._pool.submit(self._read, offset, length)

    def prepare(self, size: int | None) -> None:
        """Empty the file, if it is to hold nothing else, and give it its size."""
        if not self._replace or self._device:
            return
        os.ftruncate(self._fd.fileno(), 0)
        os.ftruncate(self._fd.fileno(), size or 0)
        self._sparse_from = 0

    def begin_write(self, offset: int, data: ReadableBuffer) -> Future[None]:
        """Write ``data``."""
        return self._pool.submit(self._write, offset, memoryview(data))

    def begin_zero(self, offset: int, length: int) -> Future[None]:
        """Nothing to do where a hole is, and stays."""
        if offset >= self._sparse_from and not self._device:
            return done(None)
        return self._pool.submit(self._write, offset, memoryview(ZEROES)[:length])

    def finish(self, size: int) -> None:
        """End the file where the copy ends, unless it goes on anyway, and put it on stable storage."""
        fd = self._fd.fileno()
        if not self._device and os.fstat(fd).st_size < self._start + size:
            os.ftruncate(fd, self._start + size)
        os.fdatasync(fd)
        os.lseek(fd, self._start + size, os.SEEK_SET)  # where the next writer of standard output goes on

    def close(self) -> None:
        """Close the file."""
        self._pool.shutdown()
        self._fd.close()

    def _read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        at, left = self._start + offset, length
        while left:
            part = os.pread(self._fd.fileno(), left, at)
            if not part:
                raise OSError(errno.ENODATA, f"the file ends at {at} now")
            parts.append(part)
            at, left = at + len(part), left - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _write(self, offset: int, view: memoryview) -> None:
        at = self._start + offset
        while view:
            written = os.pwrite(self._fd.fileno(), view, at)
            at, view = at + written, view[written:]

    def _seek(self, offset: int, whence: int, otherwise: int) -> int:
        try:
            found = os.lseek(self._fd.fileno(), self._start + offset, whence) - self._start
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end
                return otherwise
            if error.errno != errno.EINVAL:
                raise
            return offset if whence == os.SEEK_DATA else otherwise  # it cannot tell: everything is data
        return min(found, otherwise)


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _locked(path: str, flags: int, *, writable: bool) -> Fd:
    fd = Fd(os.open(path, flags | os.O_CLOEXEC, 0o666))
    try:
        mode = os.fstat(fd.fileno()).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise OperatorError(path, "it is neither a file nor a block device", "Name one, or - for a standard stream")
        if stat.S_ISREG(mode):
            _lock(fd, path, writable=writable)
    except BaseException:
        fd.close()
        raise
    return fd


def _lock(fd: Fd, path: str, *, writable: bool) -> None:
    """Lock it as QEMU's tools do. A file system that knows no locks does not matter for a copy."""
    try:
        lock_image(fd.fileno(), path, writable=writable)
    except OperatorError as error:
        reason = error.__cause__
        if isinstance(reason, OSError) and reason.errno not in (errno.EAGAIN, errno.EACCES):
            return
        raise OperatorError(path, error.cause, "Stop the other program first, or copy through its socket") from error
