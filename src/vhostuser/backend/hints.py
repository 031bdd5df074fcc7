"""What to tell a person whose guest memory is not shared, every new user's first mistake. Touches guest memory."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from vhostuser.errors import GuestMemoryError

if TYPE_CHECKING:
    from vhostuser._native import Queues
    from vhostuser.backend.vrings import Vrings

SHARE_HINT: Final = (
    "Guest memory must be shared: with QEMU use -object memory-backend-memfd,id=mem,size=...,share=on "
    "and -machine memory-backend=mem, with Cloud Hypervisor --memory shared=on"
)

FIRST_LOOK_S: Final = 1.0
"""How long after the first ring runs we look whether the guest does anything. Each later look waits twice as long."""
LAST_LOOK_S: Final = 60.0
SAMPLE: Final = 1 << 20
"""Bytes at the start of guest memory that firmware or kernel write before any driver starts."""

WORK: Final = ("reads", "writes", "flushes", "discards", "write_zeroes", "get_ids", "others", "in_flight")

log = logging.getLogger(__name__)


class SharingCheck:
    """Notices guest memory that is private to the hypervisor, and says so once per connection.

    QEMU keeps private memory to itself, or (7.2 to 10.0, with a memfd) sends a descriptor in which nothing appears that
    the guest writes: rings look empty for ever. So: a guest that kicks, whose requests are not there, and whose memory
    begins with nothing but zeroes.
    """

    def __init__(self, name: str, queues: Queues, rings: Vrings) -> None:
        """``name`` is the device's, for the log."""
        self._name = name
        self._queues = queues
        self._rings = rings
        self._over = False
        self._before: tuple[int, int] | None = None
        self._delay_s = FIRST_LOOK_S
        self._next = 0.0

    def look(self) -> None:
        """Look at what the last message brought: a ring without any memory, or the first ring that runs."""
        if self._over:
            return
        if self._rings.waiting_for_memory:
            self._warn("the front-end started a ring but gave no memory")
        elif self._before is None and self._rings.active:
            self._before = self._counts()
            self._next = time.monotonic() + self._delay_s

    def patience_s(self) -> float | None:
        """How long to wait for anything else before `look_again` is due; None: for ever."""
        if self._over or self._before is None:
            return None
        return max(0.0, self._next - time.monotonic())

    def look_again(self) -> None:
        """Look whether the guest got anywhere, when it is time to."""
        if self._over or self._before is None or time.monotonic() < self._next:
            return
        kicks, work = self._counts()
        if work != self._before[1] or self._delay_s >= LAST_LOOK_S:
            self._over = True
        elif kicks != self._before[0] and self._begins_empty():
            self._warn("the guest kicks, but nothing that it writes appears in the memory that the front-end gave")
        self._delay_s *= 2
        self._next = time.monotonic() + self._delay_s

    def _counts(self) -> tuple[int, int]:
        stats = self._queues.stats()
        return sum(one.get("kicks", 0) for one in stats), sum(one.get(key, 0) for one in stats for key in WORK)

    def _begins_empty(self) -> bool:
        memory = self._rings.memory
        if not memory.regions:
            return False
        start, size, _, _ = memory.regions[0]
        try:
            sample = memory.read(start, min(size, SAMPLE))
        except GuestMemoryError:
            return False
        return sample == bytes(len(sample))

    def _warn(self, cause: str) -> None:
        self._over = True
        log.warning("%s: %s. %s.", self._name, cause, SHARE_HINT)
