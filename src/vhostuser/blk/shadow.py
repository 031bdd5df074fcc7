"""A second memory that is made of logged pages, to see whether they were all. Touches shared memory, and its own.

In a virtual machine the copy is the destination's memory. Here it is there to be compared: what it holds of the pages
that the device writes must be what is in the real ones once the rings have stopped, else a page was written that the
back-end did not log. What the driver writes the log knows nothing of; whoever writes it says so.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from vhostuser.frontend.dirty_log import DirtyPages
from vhostuser.frontend.memory import PAGE

if TYPE_CHECKING:
    from vhostuser.blk.limits import Run
    from vhostuser.frontend.memory import SharedMemory


class Shadow:
    """The copy of one arena. `wrote`, `keep_status` and `expect` are for who holds a lane, the rest for one thread."""

    def __init__(self, memory: SharedMemory) -> None:
        """It holds nothing yet: see `fill`."""
        self._memory: Final = memory
        self._real: Final = memory.view
        self._copy: Final = mmap.mmap(-1, memory.size)
        self._kept: list[Run] = []
        self._statuses: set[int] = set()  # offsets
        self._expected: set[int] = set()  # numbers of pages
        self._logged = DirtyPages()

    def keep(self, offset: int, length: int) -> None:
        """Compare these bytes in the end: nobody writes them but the device, and who tells `wrote` of it."""
        self._kept.append((offset, length))

    def keep_status(self, guest_addr: int) -> None:
        """Compare the status byte there, too; the driver has just written it."""
        offset = guest_addr - self._memory.guest_addr
        self._statuses.add(offset)
        self._copy[offset] = self._real[offset]

    def wrote(self, offset: int, length: int) -> None:
        """The driver has written these bytes."""
        self._copy[offset : offset + length] = self._real[offset : offset + length]

    def expect(self, runs: Iterable[Run] | None) -> None:
        """The device says that it has written these guest addresses: they must be logged, also where others write, and
        where it happened to write what was there."""
        for start, length in runs or ():
            self._expected.update(range(start // PAGE, (start + length - 1) // PAGE + 1))

    def fill(self) -> int:
        """Copy everything that was ever written, and return how many pages that are."""
        pages = 0
        for start, length in self._written():
            self.wrote(start, length)
            pages += -(-length // PAGE)
        return pages

    def _written(self) -> Iterator[Run]:
        """Offset and length of what is not a hole: to read a page that nobody has written makes one."""
        fd, end = self._memory.arena.fd, 0
        while end < self._memory.size:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                return
            end = min(os.lseek(fd, start, os.SEEK_HOLE), self._memory.size)
            yield start, end - start

    def take(self, dirty: DirtyPages) -> int:
        """Copy the pages that were logged, and return how many."""
        self._logged |= dirty
        base, size = self._memory.guest_addr, self._memory.size
        for start, length in dirty.runs():
            first, end = max(start - base, 0), min(start + length - base, size)
            if first < end:
                self.wrote(first, end - first)
        return len(dirty)

    def differing(self) -> tuple[int, ...]:
        """Guest addresses of the pages that were written and not logged, in order. Only while the rings are stopped."""
        base = self._memory.guest_addr
        pages = {base // PAGE + offset // PAGE for offset in self._statuses if self._copy[offset] != self._real[offset]}
        written = list(self._written())
        for kept, size in self._kept:
            for start, length in written:
                first, last = max(kept, start), min(kept + size, start + length)
                pages.update(base // PAGE + page for page in self._unequal(first, last))
        pages.update(page for page in self._expected if page * PAGE not in self._logged)
        return tuple(sorted(page * PAGE for page in pages))

    def _unequal(self, start: int, end: int) -> Iterator[int]:
        if start >= end or self._copy[start:end] == self._real[start:end]:
            return
        for page in range(start // PAGE, (end - 1) // PAGE + 1):
            first, last = max(start, page * PAGE), min(end, (page + 1) * PAGE)
            if self._copy[first:last] != self._real[first:last]:
                yield page

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        self._copy.close()
