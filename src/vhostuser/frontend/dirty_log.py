"""The log of the pages that a back-end has written, as the host side owns it. Touches one dialogue and shared memory.

The front-end of a virtual machine that migrates copies guest memory while the machine runs, and then, over and over,
what was written meanwhile. What a device writes it cannot see: the back-end notes it, a bit for each page of 4096
bytes, in memory that the front-end gives it (vhost-user: Migration).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Self

from vhostuser._native import DirtyLog
from vhostuser.errors import BackendUnfit, SetupError
from vhostuser.fds import Fd
from vhostuser.frontend.dialogue import Dialogue
from vhostuser.frontend.memory import PAGE
from vhostuser.frontend.negotiated import Life, Negotiated, Queue
from vhostuser.protocol import (
    F_ACCESS_PLATFORM,
    F_LOG_ALL,
    FrontendRequest,
    Log,
    ProtocolFeature,
    VringAddr,
    VringFlag,
)

Req = FrontendRequest

ADVICE: Final = "Use a back-end that logs what it writes: a disk cannot be moved away from this one while it is used"


@dataclass(frozen=True, slots=True)
class DirtyPages:
    """Which pages were written: bit ``n % 8`` of byte ``n // 8`` is the page at guest address ``4096 * n``."""

    bits: bytes = b""

    def __len__(self) -> int:
        """How many."""
        return int.from_bytes(self.bits, "little").bit_count()

    def __bool__(self) -> bool:
        return any(self.bits)

    def __or__(self, other: DirtyPages) -> DirtyPages:
        """Those of both."""
        size = max(len(self.bits), len(other.bits))
        both = int.from_bytes(self.bits, "little") | int.from_bytes(other.bits, "little")
        return DirtyPages(both.to_bytes(size, "little"))

    def __contains__(self, guest_addr: int) -> bool:
        """Whether the page at a guest address is one of them."""
        at, bit = divmod(guest_addr // PAGE, 8)
        return at < len(self.bits) and bool(self.bits[at] >> bit & 1)

    def runs(self) -> Iterator[tuple[int, int]]:
        """(guest address, length in bytes) of every run of adjacent pages, in order.

        Costs as much as there are runs, and next to nothing for what is clean.
        """
        start = end = 0
        for found in FILLED.finditer(self.bits):
            first = 8 * found.start()
            for bit, count in ((0, 8 * len(found[0])),) if found[0][0] == 0xFF else RUNS[found[0][0]]:
                if first + bit != end:
                    if end:
                        yield start * PAGE, (end - start) * PAGE
                    start = first + bit
                end = first + bit + count
        if end:
            yield start * PAGE, (end - start) * PAGE


FILLED: Final = re.compile(rb"\xff+|[^\0\xff]")


def _runs_of(byte: int) -> tuple[tuple[int, int], ...]:
    """(first bit, how many) of each run of ones in a byte."""
    return tuple((found.start(), len(found[0])) for found in re.finditer("1+", f"{byte:08b}"[::-1]))


RUNS: Final = tuple(_runs_of(byte) for byte in range(256))


class HostLog:
    """A dirty log in memory of this process. It is one device's at a time; nobody else writes it."""

    def __init__(self, size: int) -> None:
        """``size`` bytes: a bit for each page from guest address 0 on. The memory can neither grow nor shrink."""
        self._log: Final = DirtyLog.create(size)

    @classmethod
    def up_to(cls, guest_addr: int) -> Self:
        """A log for guest memory that ends at ``guest_addr``."""
        return cls(_log_bytes(guest_addr))

    @property
    def size(self) -> int:
        """In bytes."""
        return self._log.size

    def take(self) -> DirtyPages:
        """What is in it; each bit is cleared in the moment it is read, so that none that is set meanwhile is lost."""
        return DirtyPages(self._log.take())

    def offer(self, dialogue: Dialogue) -> None:
        """SET_LOG_BASE: once this returns, nothing goes into another log any more.

        There is a reply in any case, and nothing in it that counts: back-ends answer all kinds of things.
        """
        with Fd(os.dup(self._log.fd)) as fd:
            reply = dialogue.ask(Req.SET_LOG_BASE, Log(self.size, 0), [fd])
        for extra in reply.fds:
            extra.close()


class Logging(Negotiated):
    """The part of `HostDevice` that owns a dirty log. For the thread of the life cycle.

    A log that was begun outlives `stop`: the rings that start next are logged, too. To go on with it behind another
    connection, after this one was lost, take it with `take_log` and give it to `start` there.
    """

    _log: HostLog | None = None

    @property
    def logging(self) -> bool:
        """Whether what the back-end writes is logged."""
        return self._log is not None

    def check_logging(self) -> None:
        """Raise `BackendUnfit` when the back-end cannot log what it writes, or not in memory that it is given."""
        if ProtocolFeature.LOG_SHMFD not in self.protocol_features:
            offered = ProtocolFeature.LOG_SHMFD in self.protocol_features_offered
            cause = "LOG_SHMFD was not negotiated with it" if offered else "it does not offer LOG_SHMFD"
            raise BackendUnfit(self.name, cause, "Ask for it: see MOVABLE" if offered else ADVICE)
        if not self.features_offered & F_LOG_ALL:
            raise BackendUnfit(self.name, "it does not offer LOG_ALL", ADVICE)

    def start_log(self) -> None:
        """Have every page logged that the back-end writes from now on: by requests, and in its used rings.

        In QEMU's order: SET_LOG_BASE, SET_FEATURES with LOG_ALL, SET_VRING_ADDR of each ring with its flag. What was
        written before is not in the log. Raises `BackendUnfit` for a back-end that cannot, and `BackendRefused` for
        one that does not want to; nothing is logged then.
        """
        self._expect(Life.STARTED)
        if self._log is not None:
            raise SetupError(f"{self.name} logs already")
        self.check_logging()
        log = self._new_log()
        log.offer(self.dialogue)
        self._log = log
        try:
            self._tell_logging()
        except BaseException:
            self._log = None
            raise

    def read_log(self) -> DirtyPages:
        """The pages written since the last time, as QEMU reads them: the log stays, and its bits are cleared. Also of
        rings that were stopped."""
        return self._own_log().take()

    def swap_log(self) -> DirtyPages:
        """The same as Cloud Hypervisor does it: the back-end is given a new log, and then the old one is read."""
        self._expect(Life.STARTED)
        old, new = self._own_log(), self._new_log()
        new.offer(self.dialogue)
        self._log = new
        return old.take()

    def stop_log(self, *, rings_first: bool = False) -> DirtyPages:
        """Have nothing logged any more; what was written until now is returned.

        QEMU takes the feature back before the flags of the rings; with ``rings_first`` it is the order of Cloud
        Hypervisor. While the rings are stopped nothing is said: they start without a log then.
        """
        log = self._own_log()
        self._log = None
        if self.life is Life.STARTED:
            try:
                self._tell_logging(rings_first=rings_first)
            except BaseException:
                self._log = log
                raise
        return log.take()

    def take_log(self) -> HostLog | None:
        """The log, which is the caller's from now on: for `start` on a later connection. None without one."""
        taken, self._log = self._log, None
        return taken

    def _tell_logging(self, *, rings_first: bool = False) -> None:
        steps = [self._set_features, self._flag_rings]
        for step in reversed(steps) if rings_first else steps:
            step()
        self.dialogue.settle()

    def _set_features(self, more: int = 0) -> None:
        super()._set_features(more | (F_LOG_ALL if self._log is not None else 0))

    def _flag_rings(self) -> None:
        for queue in self._queues:
            self.dialogue.tell(Req.SET_VRING_ADDR, self._addr(queue))

    def _addr(self, queue: Queue) -> VringAddr:
        """SET_VRING_ADDR of a ring: with the flag while there is a log."""
        addr = queue.addr(guest=bool(self.features & F_ACCESS_PLATFORM))
        return addr if self._log is None else replace(addr, flags=VringFlag.LOG)

    def _offer_log(self) -> None:
        """While rings start: they are described, and none is enabled yet. A log that has no bits for all of the memory
        gives way to a larger one, and what is in it is lost: then everything has to be copied anyway."""
        if self._log is not None:
            if self._log.size < _log_bytes(self._end_of_memory()):
                self._log = self._new_log()
            self._log.offer(self.dialogue)

    def _own_log(self) -> HostLog:
        if self._log is None:
            raise SetupError(f"{self.name} does not log")
        return self._log

    def _new_log(self) -> HostLog:
        return HostLog.up_to(self._end_of_memory())

    def _end_of_memory(self) -> int:
        if self._memory is None:
            raise SetupError(f"{self.name} has no memory that could be written")
        return self._memory.guest_addr + self._memory.size


def _log_bytes(guest_addr: int) -> int:
    """The size of a log for guest memory that ends at ``guest_addr``: of whole 8 bytes, as QEMU makes it."""
    return -(-guest_addr // (PAGE * 64)) * 8
