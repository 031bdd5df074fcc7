"""What to tell a person whose guest memory is not shared, every new user's first mistake. Touches memory files."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vhostuser.backend.vrings import Vrings
    from vhostuser.fds import Fd
    from vhostuser.protocol import MemoryRegion

SHARE_HINT: Final = (
    "Guest memory must be shared: with QEMU use -object memory-backend-memfd,id=mem,size=...,share=on "
    "and -machine memory-backend=mem, with Cloud Hypervisor --memory shared=on"
)

log = logging.getLogger(__name__)


class SharingCheck:
    """Notices guest memory that is private to the hypervisor, and says so once per connection.

    Private memory may come with a descriptor all the same; whatever the guest writes then never reaches the file. So a
    file of which nothing was ever written, when a ring already runs in it, is no guest memory. The lowest region is
    looked at: firmware and kernels write there before any driver starts.
    """

    def __init__(self) -> None:
        self._lowest: tuple[int, Fd] | None = None
        self._warned = False

    def replace(self, regions: Sequence[MemoryRegion], fds: Sequence[Fd]) -> None:
        """Remember the lowest of the regions of a whole table. The descriptors stay the caller's."""
        self.close()
        for region, fd in zip(regions, fds, strict=True):
            self.add(region, fd)

    def add(self, region: MemoryRegion, fd: Fd) -> None:
        """Remember the region when it is the lowest so far. The descriptor stays the caller's."""
        if not self._warned and (self._lowest is None or region.guest_addr < self._lowest[0]):
            self.close()
            self._lowest = region.guest_addr, fd.duplicate()

    def look(self, name: str, rings: Vrings) -> None:
        """Log the hint when a ring was started on memory that cannot be shared. ``name`` is the device's."""
        if self._warned:
            return
        if rings.waiting_for_memory:
            self._warn(name, "the front-end started a ring but gave no memory")
        elif rings.active and self._lowest is not None and _never_written(self._lowest[1]):
            self._warn(name, "nothing was ever written to the guest memory that the front-end gave")

    def close(self) -> None:
        """Close what is kept. Idempotent."""
        if self._lowest is not None:
            self._lowest[1].close()
            self._lowest = None

    def _warn(self, name: str, cause: str) -> None:
        self._warned = True
        self.close()
        log.warning("%s: %s. %s.", name, cause, SHARE_HINT)


def _never_written(fd: Fd) -> bool:
    status = os.fstat(fd.fileno())
    return stat.S_ISREG(status.st_mode) and status.st_blocks == 0
