"""What a front-end shares with its back-end: one arena, and who uses which part of it. Touches `_native`.

There is one region, so that every back-end has room for it: those with 8 and those without memory slots.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self, cast

from vhostuser._native import Arena
from vhostuser.errors import SetupError
from vhostuser.protocol import MemoryRegion

PAGE: Final = 4096
"""Every buffer begins at a multiple of it: storage opened with O_DIRECT takes such memory as it is."""

GUEST_BASE: Final = 1 << 30
"""The guest address of the first byte. It is not 0 and not the user address, so that a back-end that confuses the two
kinds of addresses is found out; it is aligned to huge pages of every size but the largest."""


MARK: Final = b"shared memory of a vhostuser front-end"
"""The first page holds this and nothing else: no ring or buffer lies where an address that is wrong by all points, and
a back-end that looks for signs of life in memory, lest it be private, finds one before the first request."""


class Pool:
    """Hands out runs of a range of the arena, each a whole number of pages. Not thread-safe: its owner locks."""

    def __init__(self, start: int, size: int) -> None:
        """``start`` and ``size`` are bytes of the arena, multiples of `PAGE`."""
        self.start: Final = start
        self.size: Final = size
        self.free = size
        self._runs = [(start, size)] if size else []  # sorted, never adjacent
        self._ready: dict[int, list[int]] = {}  # by length: given back and not joined

    def take(self, length: int) -> int | None:
        """The offset of ``length`` bytes, or None when no run is long enough. `give` takes them back."""
        length = _pages(length)
        ready = self._ready.get(length)
        if ready:
            self.free -= length
            return ready.pop()
        place = self._first_fit(length)
        if place is None and self._ready:
            self._join()
            place = self._first_fit(length)
        if place is not None:
            self.free -= length
        return place

    def give(self, offset: int, length: int) -> None:
        """Take back what `take` handed out for the same ``length``."""
        length = _pages(length)
        self.free += length
        self._ready.setdefault(length, []).append(offset)

    def _first_fit(self, length: int) -> int | None:
        for at, (start, size) in enumerate(self._runs):
            if size > length:
                self._runs[at] = (start + length, size - length)
                return start
            if size == length:
                del self._runs[at]
                return start
        return None

    def _join(self) -> None:
        """Make long runs again of what was given back in short ones."""
        for length, offsets in self._ready.items():
            for offset in offsets:
                insort(self._runs, (offset, length))
        self._ready.clear()
        joined: list[tuple[int, int]] = []
        for start, size in self._runs:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        self._runs = joined


class SharedMemory:
    """The arena of one connection. It is never used for a second one: the old back-end may still write into it.

    `reserve` is for set-up, on one thread; `allocate` and `Buffer.release` may be called from any.
    """

    def __init__(self, reserved: int, buffers: int, *, guest_addr: int = GUEST_BASE, huge_pages: bool = False) -> None:
        """``reserved`` bytes for rings and the like, and ``buffers`` bytes for `allocate`; both are rounded up.

        Pages are taken when they are first touched. ``huge_pages`` takes them from the system's reserve. Raises
        `OSError` when there is not enough of either.
        """
        reserved, buffers = PAGE + _pages(reserved), _pages(buffers)
        total = reserved + buffers
        if huge_pages:
            step = _huge_page_size()
            total = -(-total // step) * step
        self.arena: Final = Arena(total, huge_pages=huge_pages)
        self.guest_addr: Final = guest_addr
        self.view: Final = memoryview(cast("bytearray", self.arena))  # before Python 3.12 no type says "has a buffer"
        self._reserve = reserved
        self._reserved = PAGE
        self.view[: len(MARK)] = MARK
        self._pool = Pool(reserved, total - reserved)
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """The whole arena, in bytes."""
        return self.arena.size

    @property
    def user_addr(self) -> int:
        """Where the arena is mapped in this process: what ring addresses are counted from."""
        return self.arena.address

    @property
    def region(self) -> MemoryRegion:
        """The one region, as SET_MEM_TABLE and ADD_MEM_REG describe it."""
        return MemoryRegion(self.guest_addr, self.size, self.user_addr, 0)

    @property
    def free(self) -> int:
        """Bytes that `allocate` can still hand out, though perhaps not in one piece."""
        return self._pool.free

    def reserve(self, length: int) -> int:
        """The offset of ``length`` bytes, a multiple of `PAGE`, that are never given back. Raises `SetupError`."""
        offset = self._reserved
        if offset + _pages(length) > self._reserve:
            raise SetupError(f"{length} bytes do not fit into the {self._reserve - offset} reserved that are left")
        self._reserved += _pages(length)
        return offset

    def allocate(self, length: int) -> Buffer:
        """A buffer of ``length`` bytes; what is in it is what was there. Raises `SetupError` when there is no room."""
        if length <= 0:
            raise SetupError(f"a buffer has at least one byte, not {length}")
        with self._lock:
            offset = self._pool.take(length)
        if offset is None:
            raise SetupError(
                f"no {length} bytes in one piece are left: {self._pool.free} of {self._pool.size} bytes are free"
            )
        return Buffer(_Allocation(self, offset, length), 0, length)

    def take_back(self, offset: int, length: int) -> None:
        """What `Buffer.release` ends in."""
        with self._lock:
            self._pool.give(offset, length)


class _Allocation:
    """Room handed out by `SharedMemory.allocate`: given back once it is released and no request uses it."""

    __slots__ = ("_lock", "_released", "_users", "length", "memory", "offset")

    def __init__(self, memory: SharedMemory, offset: int, length: int) -> None:
        self.memory = memory
        self.offset = offset
        self.length = length
        self._lock = threading.Lock()
        self._users = 0
        self._released = False

    def hold(self) -> None:
        with self._lock:
            if self._released:
                raise SetupError("the buffer is released")
            self._users += 1

    def drop(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users or not self._released:
                return
        self.memory.take_back(self.offset, self.length)

    def release(self) -> None:
        with self._lock:
            if self._released:
                return
            self._released = True
            if self._users:
                return
        self.memory.take_back(self.offset, self.length)


class Buffer:
    """Memory that the back-end reads and writes itself: nothing is copied. ``view`` is how to get at its bytes.

    ``buffer[a:b]`` is a buffer of the same memory. `release` gives the room back, also at the end of a ``with`` block,
    but not before the requests that use it are answered; views that are kept show what others store there then. A
    buffer that is never released keeps its room until the connection ends.
    """

    __slots__ = ("_allocation", "_length", "_start")

    def __init__(self, allocation: _Allocation, start: int, length: int) -> None:
        """Made by `SharedMemory.allocate`."""
        self._allocation = allocation
        self._start = start
        self._length = length

    @property
    def memory(self) -> SharedMemory:
        """The arena it lies in."""
        return self._allocation.memory

    @property
    def offset(self) -> int:
        """Its first byte, counted from the start of the arena."""
        return self._allocation.offset + self._start

    @property
    def guest_addr(self) -> int:
        """The guest address of its first byte: what goes into descriptors."""
        return self.memory.guest_addr + self.offset

    @property
    def view(self) -> memoryview:
        """Its bytes, writable."""
        return self.memory.view[self.offset : self.offset + self._length]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Buffer:
        start, stop, step = part.indices(self._length)
        if step != 1:
            raise ValueError("a buffer has no steps")
        return Buffer(self._allocation, self._start + start, max(0, stop - start))

    def hold(self) -> None:
        """Keep the room from being given back until `drop`: a request uses it. Raises `SetupError` once released."""
        self._allocation.hold()

    def drop(self) -> None:
        """The request that called `hold` is over."""
        self._allocation.drop()

    def release(self) -> None:
        """Give the room back, of all buffers that share it. Idempotent."""
        self._allocation.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __iter__(self) -> Iterator[int]:
        return iter(self.view)

    def __repr__(self) -> str:
        return f"Buffer({self._length} bytes at {self.guest_addr:#x})"


def _pages(length: int) -> int:
    return -(-length // PAGE) * PAGE


def _huge_page_size() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("Hugepagesize:"):
                return int(line.split()[1]) * 1024
    raise SetupError("this kernel has no huge pages")
