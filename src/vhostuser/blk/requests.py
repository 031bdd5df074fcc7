"""What can be asked of a disk, and what becomes of it on the way to the ring. Touches the buffers it is given."""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from vhostuser.blk.limits import DiskLimits, Run, cut_ranges
from vhostuser.errors import RequestFailed, RequestRefused, SetupError
from vhostuser.frontend.memory import Buffer, SharedMemory
from vhostuser.virtio.blk import ID_BYTES, SECTOR
from vhostuser.virtio.blk_requests import BlkRequestType, BlkStatus, DiscardWriteZeroes, SegmentFlag

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    Source: TypeAlias = Buffer | ReadableBuffer
    Target: TypeAlias = Buffer | WriteableBuffer

Kind = BlkRequestType

NO_STATUS: Final = 0xFF


@dataclass(frozen=True, slots=True)
class Read:
    """Read ``length`` bytes; the result is `bytes`."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ReadInto:
    """Read into one buffer, or into several in turn. The result is None."""

    offset: int
    buffers: Target | Sequence[Target]


@dataclass(frozen=True, slots=True)
class Write:
    """Write one buffer, or several in turn. The result is None."""

    offset: int
    buffers: Source | Sequence[Source]


@dataclass(frozen=True, slots=True)
class Flush:
    """Make everything durable that was answered before; does nothing on a disk without a volatile cache."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Give up what is stored there: it reads as anything afterwards."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class WriteZeroes:
    """Make it read as zeroes; ``unmap`` lets the storage be given back."""

    offset: int
    length: int
    unmap: bool = False


@dataclass(frozen=True, slots=True)
class GetId:
    """Ask for the serial; the result is 20 `bytes`, filled up with zeroes."""


Request: TypeAlias = Read | ReadInto | Write | Flush | Discard | WriteZeroes | GetId


class Promise(Protocol):
    """Where the result goes: a future of `concurrent.futures` or of `asyncio`."""

    def done(self) -> bool: ...
    def set_result(self, result: object, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


@dataclass(slots=True)
class Part:
    """One request on the ring. Either the back-end uses ``pieces``, or ``length`` bytes are copied for it."""

    job: Job
    kind: int
    sector: int
    writable: bool
    length: int
    at: int  # where its bytes are in the job's data
    pieces: list[Run] | None  # guest addresses; None: copied


class Job:
    """A request under way: cut into parts, of which several may be in the ring at once."""

    __slots__ = ("_held", "_views", "collected", "error", "next_part", "parts", "promise", "settled", "unanswered")

    def __init__(self, request: Request, limits: DiskLimits, memory: SharedMemory, promise: Promise) -> None:
        """Raises `RequestRefused` for what the disk cannot take, before anything is sent."""
        self.promise = promise
        self.collected: list[tuple[int, bytes]] | None = None  # what was read, for results that are bytes
        self.error: RequestFailed | None = None
        self.unanswered = 0
        self.settled = False
        self._held: list[Buffer] = []
        self._views = NO_VIEWS
        self.parts = self._cut(request, limits, memory)
        self.next_part: Part | None = next(self.parts, None)

    @property
    def empty(self) -> bool:
        """Whether there was nothing to send from the beginning. Only before it is submitted."""
        return self.next_part is None

    def advance(self) -> None:
        """The next part was put into the ring."""
        self.unanswered += 1
        self.next_part = next(self.parts, None)

    def load(self, part: Part, into: memoryview) -> None:
        """Copy what ``part`` writes to where the back-end finds it."""
        self._views.copy(part.at, into, store=False)

    def answered(self, part: Part, status: int, copied: memoryview | None) -> bool:
        """Take the answer to ``part``; True when it was the last. ``copied`` is what the back-end wrote for it."""
        self.unanswered -= 1
        if status != BlkStatus.OK:
            self.error = self.error or _failure(part, status)
            self.next_part = None  # what is in the ring goes on, and the rest is spared
        elif copied is not None and part.writable:
            if self.collected is not None:
                self.collected.append((part.at, bytes(copied)))
            else:
                self._views.copy(part.at, copied, store=True)
        return self.unanswered == 0 and self.next_part is None

    def settle(self, error: BaseException | None = None) -> None:
        """Give the result, or ``error``, to who waits for it, once. Not under a lock: it may run anything."""
        if self.settled:
            return
        self.settled = True
        self.release()
        failure = error or self.error
        if self.promise.done():  # given up by who waited
            return
        if failure is not None:
            self.promise.set_exception(failure)
        else:
            self.promise.set_result(self._result())

    def release(self) -> None:
        """Let go of the caller's buffers."""
        for buffer in self._held:
            buffer.drop()
        self._held.clear()
        self._views = NO_VIEWS

    def _result(self) -> object:
        if self.collected is None:
            return None
        if len(self.collected) == 1:
            return self.collected[0][1]
        return b"".join(data for _, data in sorted(self.collected))

    def _cut(self, request: Request, limits: DiskLimits, memory: SharedMemory) -> Iterator[Part]:
        match request:
            case Read(offset, length):
                limits.check(offset, length, writes=False)
                self.collected = []
                return self._copied(limits, Kind.IN, offset, length)
            case ReadInto(offset, buffers):
                return self._moved(limits, memory, Kind.IN, offset, _several(buffers))
            case Write(offset, buffers):
                return self._moved(limits, memory, Kind.OUT, offset, _several(buffers))
            case Flush():
                return iter((Part(self, Kind.FLUSH, 0, False, 0, 0, []),) if limits.flushes else ())
            case Discard(offset, length):
                ranges = limits.discard
                if ranges is None:
                    raise RequestRefused("the disk does not offer to discard")
                limits.check(offset, length, writes=True)
                return self._listed(Kind.DISCARD, 0, cut_ranges(ranges, offset, length))
            case WriteZeroes(offset, length, unmap):
                ranges = limits.write_zeroes
                if ranges is None:
                    raise RequestRefused("the disk does not offer to write zeroes")
                limits.check(offset, length, writes=True)
                flags = SegmentFlag.UNMAP if unmap else 0
                return self._listed(Kind.WRITE_ZEROES, flags, cut_ranges(ranges, offset, length))
            case GetId():
                self.collected = []
                return iter((Part(self, Kind.GET_ID, 0, True, ID_BYTES, 0, None),))

    def _copied(self, limits: DiskLimits, kind: Kind, offset: int, length: int) -> Iterator[Part]:
        for at in range(0, length, limits.max_bytes):
            size = min(limits.max_bytes, length - at)
            yield Part(self, kind, (offset + at) // SECTOR, kind is Kind.IN, size, at, None)

    def _moved(
        self, limits: DiskLimits, memory: SharedMemory, kind: Kind, offset: int, buffers: Sequence[Target | Source]
    ) -> Iterator[Part]:
        """Buffers of the arena are used where they are, if every one is whole blocks; else everything is copied."""
        views = _Views([item.view if isinstance(item, Buffer) else memoryview(item).cast("B") for item in buffers])
        limits.check(offset, views.length, writes=kind is Kind.OUT)
        if kind is Kind.IN and any(view.readonly for view in views.views):
            raise RequestRefused("a buffer to read into cannot be written")
        ours = [item for item in buffers if isinstance(item, Buffer)]
        for buffer in ours:
            if buffer.memory is not memory:
                raise RequestRefused("the buffer belongs to another connection, or to one that is over")
        if len(ours) < len(buffers) or any(len(buffer) % limits.block_size for buffer in ours):
            self._views = views
            self._hold(ours)
            return self._copied(limits, kind, offset, views.length)
        self._hold(ours)
        runs = [(buffer.guest_addr, len(buffer)) for buffer in ours if len(buffer)]
        return self._direct(limits, kind, offset, runs)

    def _hold(self, buffers: Sequence[Buffer]) -> None:
        try:
            for buffer in buffers:
                buffer.hold()
                self._held.append(buffer)
        except SetupError as error:
            self.release()
            raise RequestRefused(str(error)) from error

    def _direct(self, limits: DiskLimits, kind: Kind, offset: int, runs: Sequence[Run]) -> Iterator[Part]:
        at = 0
        for pieces in limits.cut(runs) if runs else ():
            length = sum(size for _, size in pieces)
            yield Part(self, kind, (offset + at) // SECTOR, kind is Kind.IN, length, at, pieces)
            at += length

    def _listed(self, kind: Kind, flags: int, requests: Iterator[list[Run]]) -> Iterator[Part]:
        for ranges in requests:
            listed = b"".join(DiscardWriteZeroes(sector, count, flags).pack() for sector, count in ranges)
            self._views = _Views([memoryview(listed)])
            yield Part(self, kind, 0, False, len(listed), 0, None)


class _Views:
    """Several pieces of memory, seen as one."""

    __slots__ = ("ends", "length", "views")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self.views = views
        self.ends = list(accumulate(len(view) for view in views))
        self.length = self.ends[-1] if self.ends else 0

    def copy(self, at: int, other: memoryview, *, store: bool) -> None:
        """Copy ``other`` to the bytes from ``at`` on (``store``), or those bytes to it."""
        index = bisect_right(self.ends, at)
        done = 0
        while done < len(other):
            view = self.views[index]
            start = at + done - (self.ends[index] - len(view))
            size = min(len(view) - start, len(other) - done)
            here, there = view[start : start + size], other[done : done + size]
            if store:
                here[:] = there
            else:
                there[:] = here
            done += size
            index += 1


NO_VIEWS: Final = _Views(())


def _several(buffers: object) -> Sequence[Target | Source]:
    if isinstance(buffers, list | tuple):
        return buffers
    return (buffers,)  # type: ignore[return-value]  # what else it is, memoryview() judges


ERRNOS: Final = {BlkStatus.IOERR: errno.EIO, BlkStatus.UNSUPP: errno.EOPNOTSUPP}


def _failure(part: Part, status: int) -> RequestFailed:
    name = Kind(part.kind).name
    if status == NO_STATUS:
        cause = f"the device gave {name} at sector {part.sector} back without a status"
    else:
        known = BlkStatus(status).name if status in BlkStatus.__members__.values() else f"{status:#x}, which is unknown"
        cause = f"{name} at sector {part.sector} failed with status {known}"
    return RequestFailed(ERRNOS.get(status, errno.EIO), cause, status, part.kind, part.sector)  # type: ignore[call-overload]
