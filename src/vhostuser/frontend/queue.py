"""One ring of a device, host side: its place in the arena, its eventfds, and what drives it. Touches `_native`."""

from __future__ import annotations

import os
from typing import Final, Generic, TypeVar

from vhostuser._native import DriverRing, RequestQueue
from vhostuser.errors import SetupError
from vhostuser.fds import Fd
from vhostuser.frontend.memory import PAGE, SharedMemory
from vhostuser.protocol import VringAddr

D = TypeVar("D")

MAX_RING: Final = 32768


class HostQueue(Generic[D]):
    """One ring and what belongs to it. `HostDevice.start` gives it to the back-end.

    ``driver`` is what fills it: a `RequestQueue` for the requests of a disk, a `DriverRing` for any chain, or what a
    tester has made.
    """

    def __init__(self, memory: SharedMemory, index: int, size: int, driver: D, areas: tuple[int, int, int]) -> None:
        """``areas``: arena offsets of the descriptor table, the available ring and the used ring."""
        self.memory: Final = memory
        self.index: Final = index
        self.size: Final = size
        self.driver: D = driver
        self.areas: Final = areas
        self.base = 0
        """Where the back-end takes the next chain when it starts the ring; set by `HostDevice.stop`."""
        self.kick: Final = eventfd()
        self.call: Final = eventfd()
        self.err: Final = eventfd()

    def addr(self, *, guest: bool = False) -> VringAddr:
        """The payload of SET_VRING_ADDR: in user addresses, or in ``guest`` addresses, as behind an IOMMU."""
        origin = self.memory.guest_addr if guest else self.memory.user_addr
        desc, avail, used = (origin + area for area in self.areas)
        return VringAddr(self.index, 0, desc, used, avail, self.memory.guest_addr + self.areas[2])

    @property
    def used_index(self) -> int:
        """How far the back-end has answered, as the used ring says: 0 to 65535."""
        used_idx = self.areas[2] + 2
        return int.from_bytes(self.memory.view[used_idx : used_idx + 2], "little")

    def notify(self) -> None:
        """Kick the back-end."""
        os.eventfd_write(self.kick.fileno(), 1)

    def called(self) -> bool:
        """Whether the back-end has called since the last time; does not wait."""
        return _taken(self.call)

    def failed(self) -> bool:
        """Whether the back-end has reported an error of this ring since the last time; does not wait."""
        return _taken(self.err)

    def close(self) -> None:
        """Close the eventfds. Idempotent."""
        for fd in (self.kick, self.call, self.err):
            fd.close()


def request_queue(
    memory: SharedMemory, index: int, size: int, *, seg_max: int, features: int
) -> HostQueue[RequestQueue]:
    """A queue of a virtio disk, in room that is reserved for it: see `RequestQueue.bytes_needed`."""
    check_size(size)
    offset = memory.reserve(RequestQueue.bytes_needed(size, seg_max))
    driver = RequestQueue(
        memory.arena, base=memory.guest_addr, offset=offset, size=size, seg_max=seg_max, features=features
    )
    return HostQueue(memory, index, size, driver, driver.areas)


def plain_queue(memory: SharedMemory, index: int, size: int, *, features: int, base: int = 0) -> HostQueue[DriverRing]:
    """A ring for chains of any kind, in room that is reserved for it: see `ring_bytes`."""
    check_size(size)
    desc, avail, used = areas = ring_areas(memory.reserve(ring_bytes(size)), size)
    driver = DriverRing(memory.arena, size=size, desc=desc, avail=avail, used=used, features=features, base=base)
    queue = HostQueue(memory, index, size, driver, areas)
    queue.base = base
    return queue


def ring_bytes(size: int) -> int:
    """What `plain_queue` reserves for a ring of ``size`` descriptors."""
    return _pages(16 * size + 6 + 2 * size) + _pages(6 + 8 * size)


def ring_areas(start: int, size: int) -> tuple[int, int, int]:
    """Where the areas of a ring lie that begins at ``start``, a multiple of `PAGE`; the used ring has its own pages."""
    avail = start + 16 * size
    return start, avail, _pages(avail + 6 + 2 * size)


def check_size(size: int) -> None:
    """Raise `SetupError` unless ``size`` is one that a split ring may have."""
    if not 1 <= size <= MAX_RING or size & (size - 1):
        raise SetupError(f"a ring has a power of two of descriptors, 1 to {MAX_RING}, not {size}")


def eventfd() -> Fd:
    """A new eventfd, which never blocks."""
    return Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def _taken(fd: Fd) -> bool:
    try:
        return os.eventfd_read(fd.fileno()) > 0
    except BlockingIOError:
        return False


def _pages(length: int) -> int:
    return -(-length // PAGE) * PAGE
