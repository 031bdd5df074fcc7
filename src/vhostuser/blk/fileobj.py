"""A disk as a raw file of single bytes. Touches the client it is made from."""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING

from vhostuser.blk.requests import Write

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from vhostuser.blk.client import BlockClient


class DiskFile(io.RawIOBase):
    """What opening a block device gives: any offset and length, the size fixed, `os.SEEK_END` is the end of the disk.

    Whole blocks go straight to the disk. What begins or ends inside of a block reads that block, and to be written,
    reads, changes and writes it: no other writer may use the same block meanwhile. Wrap it into `io.BufferedReader` or
    `io.BufferedRandom` for small accesses. One thread at a time. Closing flushes the disk and leaves the client open.
    """

    def __init__(self, client: BlockClient) -> None:
        """``client`` stays the caller's."""
        self._client = client
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """Whether the disk can be written."""
        return not self._client.read_only

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move, also beyond the end, and return the position. Raises `OSError` for one before the start."""
        self._check()
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._client.size}.get(whence)
        if origin is None:
            raise ValueError(f"whence is 0, 1 or 2, not {whence}")
        if origin + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill ``buffer`` as far as the disk goes, and return how many bytes that were: 0 at the end."""
        self._check()
        into = memoryview(buffer).cast("B")
        length = max(0, min(len(into), self._client.size - self._position))
        if not length:
            return 0
        start, before, after = self._blocks(length)
        if before or after:
            data = self._client.read(start, before + length + after)
            into[:length] = memoryview(data)[before : before + length]
        else:
            self._client.readinto(start, into[:length])
        self._position += length
        return length

    def write(self, data: ReadableBuffer) -> int:
        """Write ``data`` as far as the disk goes, and return how many bytes that were. Raises ENOSPC at the end."""
        self._check()
        whole = memoryview(data).cast("B")
        length = max(0, min(len(whole), self._client.size - self._position))
        if not length and len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if length:
            start, before, after = self._blocks(length)
            first, last = self._edge(start, before), self._edge_before(start + before + length, after)
            self._client.submit(Write(start, [first, whole[:length], last])).result()
        self._position += length
        return length

    def flush(self) -> None:
        """Make what was written durable."""
        if not self.closed and self.writable():
            self._client.flush()

    def _blocks(self, length: int) -> tuple[int, int, int]:
        """Where the blocks around ``length`` bytes from here on begin, and how much more they hold before and after."""
        block = self._client.block_size
        before = self._position % block
        return self._position - before, before, -(before + length) % block

    def _edge(self, start: int, length: int) -> bytes:
        """The first ``length`` bytes of the block at ``start``."""
        return self._client.read(start, self._client.block_size)[:length] if length else b""

    def _edge_before(self, position: int, length: int) -> bytes:
        """The last ``length`` bytes of the block that ``position`` lies in."""
        block = self._client.block_size
        return self._client.read(position - position % block, block)[-length:] if length else b""

    def _check(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")
