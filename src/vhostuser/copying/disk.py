"""A disk behind a back-end as an end of a copy. Touches the client it is given."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

from vhostuser.blk.client import BlockClient
from vhostuser.blk.requests import Flush, Read, Write, WriteZeroes
from vhostuser.copying.sides import CHUNK, ZEROES, Piece, cut
from vhostuser.errors import UsageError
from vhostuser.virtio.blk import BlkFeature

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WINDOW: Final = 16
ZERO_STEP: Final = 1 << 30


class DiskSide:
    """Some bytes of a disk. A block that the copy ends inside of is read, changed and written."""

    def __init__(self, name: str, client: BlockClient, *, start: int = 0, length: int | None = None) -> None:
        """Takes ``client``. ``start`` and ``length`` are bytes; without ``length``, up to the end of the disk.

        Raises `UsageError` for what lies outside of the disk.
        """
        self.name: Final = name
        self.window: Final = WINDOW
        self._client = client
        self._start = start
        rest = client.size - start
        if rest < 0 or (length is not None and length > rest):
            what = f"offset {start}" if length is None else f"{length} bytes at {start}"
            raise UsageError(name, f"its disk ends at {client.size} bytes, before {what}", "Choose a part of the disk")
        self.size: Final = rest if length is None else length

    @property
    def grain(self) -> int:
        """A block."""
        return self._client.block_size

    @property
    def capacity(self) -> int:
        """The rest of the disk."""
        return self.size

    @property
    def readable(self) -> bool:
        """Always."""
        return True

    @property
    def zero_step(self) -> int:
        """Much, when the disk zeroes by itself; a chunk when zeroes are data."""
        return ZERO_STEP if self._zeroes else CHUNK

    @property
    def _zeroes(self) -> bool:
        return bool(self._client.features & BlkFeature.WRITE_ZEROES)

    def pieces(self) -> Iterator[Piece]:
        """Everything: such a disk does not tell where it holds nothing."""
        for at, length in cut(0, self.size, CHUNK):
            yield at, length, True

    def begin(self, offset: int, length: int) -> Future[bytes]:
        """Read whole blocks, and cut off what is too much."""
        start, before, after = self._blocks(offset, length)
        future = self._client.submit(Read(start, before + length + after))
        return _Part(future, before, length) if before or after else future

    def prepare(self, size: int | None) -> None:
        """Raise `UsageError` for a disk that cannot be written, or not from there on.

        Were the start inside of a block, two parts of the copy would meet in each block where they meet.
        """
        if self._client.read_only:
            raise UsageError(self.name, "its disk is read-only", "Serve it without --read-only, or copy elsewhere")
        if self._start % self.grain:
            raise UsageError(
                self.name,
                f"offset {self._start} lies inside of a block of {self.grain} bytes",
                f"Begin at a multiple of {self.grain}",
            )

    def begin_write(self, offset: int, data: ReadableBuffer) -> Future[None]:
        """Write ``data``, and after it the rest of the block that it ends in."""
        view = memoryview(data)
        start, _, after = self._blocks(offset, len(view))
        if not after:
            return self._client.submit(Write(start, view))
        last = self._client.read(start + len(view) + after - self.grain, self.grain)
        return self._client.submit(Write(start, [view, last[-after:]]))

    def begin_zero(self, offset: int, length: int) -> Future[None]:
        """Have the disk zero it, and give the space back if it likes."""
        start, _, after = self._blocks(offset, length)
        if self._zeroes and not after:
            return self._client.submit(WriteZeroes(start, length, unmap=True))
        if length <= CHUNK:
            return self.begin_write(offset, ZEROES[:length])
        *parts, (last_at, last) = cut(offset, length, CHUNK)
        for at, part in parts:
            self.begin_write(at, ZEROES[:part]).result()
        return self.begin_write(last_at, ZEROES[:last])

    def finish(self, size: int) -> None:
        """Flush the disk."""
        self._client.submit(Flush()).result()

    def close(self) -> None:
        """Hang up, once everything under way is answered."""
        self._client.close()

    def _blocks(self, offset: int, length: int) -> tuple[int, int, int]:
        """Where on the disk the blocks around a range begin, and how much more they hold before and after."""
        at, grain = self._start + offset, self.grain
        before = at % grain
        return at - before, before, -(before + length) % grain


class _Part(Future[bytes]):
    """The middle of what another future brings."""

    def __init__(self, whole: Future[bytes], before: int, length: int) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()

        def settle(whole: Future[bytes]) -> None:
            error = whole.exception()
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(whole.result()[before : before + length])

        whole.add_done_callback(settle)
