"""A guest with one ring that outlives its back-ends. Touches one socket at a time, and memory shared with them."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Final

from tests.backend.frontend import INDIRECT_EVENT_V1, Frontend, GoneError, GuestRam, GuestRing
from tests.backend.inflight import Part

from vhostuser._native import InflightRegion
from vhostuser.protocol import FrontendRequest, Inflight

Req = FrontendRequest
IN: Final = 0
OUT: Final = 1
OK: Final = 0
SIZE: Final = 16
RETRY_S: Final = 0.001
"""How soon somebody who found nobody listening tries again, as hypervisors do in their time."""
CELL: Final = 1024
"""Bytes for one request: header, one sector, status."""


class Guest:
    """Writes single sectors, each with a content of its own, and connects again as QEMU does."""

    def __init__(self, place: Path, *, tracked: bool = True) -> None:
        """Connect to the back-end at ``place``. ``tracked``: with a region that keeps what is in flight."""
        self.peer = Frontend.connect(str(place))
        self.place = place
        self.ram = GuestRam()
        self.ring = GuestRing(self.ram, 0, SIZE, INDIRECT_EVENT_V1)
        self.region = InflightRegion.create(1, SIZE) if tracked else None
        self._set_up()

    def connect(self) -> None:
        """Connect again, with the ring as it is and the region."""
        self.peer.close()
        self.peer = Frontend.connect(str(self.place))
        self._set_up()

    def move(self, place: Path) -> Frontend:
        """Stop the ring and go on behind the back-end at ``place``, as in a live migration; returns the connection that
        was, which is the caller's to close."""
        base, left = self.ring.stop(self.peer), self.peer
        self.peer, self.place = Frontend.connect(str(place)), place
        self._set_up(base)
        return left

    def _set_up(self, base: int | None = None) -> None:
        self.peer.negotiate()
        if self.region is not None:
            self.peer.do(Req.SET_INFLIGHT_FD, Inflight(self.region.size, 0, 1, SIZE), [self.region.fd])
        self.ram.share(self.peer)
        self.ring.start(self.peer, base=self.ring.driver.used_index if base is None else base)

    def write(self, sector: int, fill: int) -> int:
        """Submit a write of one sector and return its head."""
        at = self.cell(sector)
        view = memoryview(self.ram.arena)
        view[at : at + 16] = OUT.to_bytes(8, "little") + sector.to_bytes(8, "little")
        view[at + 16 : at + 528] = bytes([fill]) * 512
        view[at + 528] = 0xFF
        return self.ring.submit([(at, 528)], [(at + 528, 1)])

    def cell(self, sector: int) -> int:
        """Where the request for a sector lies."""
        return self.ram.scratch + sector * CELL

    def status(self, sector: int) -> int:
        """What became of the last write of a sector; 255 when nothing did yet."""
        return memoryview(self.ram.arena)[self.cell(sector) + 528]

    def read(self, sector: int) -> bytes:
        """Read one sector, alone in the ring, and wait for it."""
        at = self.ram.scratch + 512 * CELL
        view = memoryview(self.ram.arena)
        view[at : at + 16] = IN.to_bytes(8, "little") + sector.to_bytes(8, "little")
        head = self.ring.submit([(at, 16)], [(at + 16, 513)])
        assert [done for done, _ in self.ring.wait()] == [head]
        assert view[at + 528] == OK
        return bytes(view[at + 16 : at + 528])

    def answered(self, count: int) -> list[int]:
        """The heads of the next ``count`` answers."""
        heads: list[int] = []
        while len(heads) < count:
            heads += [head for head, _ in self.ring.wait()]
        return heads

    def answered_by_anyone(self, count: int) -> int:
        """Wait for ``count`` answers, and connect again whenever the back-end is gone; return how often that was."""
        connections, left = 0, count
        while left:
            if done := self.ring.driver.reap():
                left -= len(done)
            elif not self.ring.driver.enable_calls():
                ready, _, _ = select.select([self.ring.call, self.peer.socket], [], [])
                if self.ring.call in ready:
                    os.eventfd_read(self.ring.call)
                else:
                    self.come_back()
                    connections += 1
        return connections

    def come_back(self) -> None:
        """Connect again, for as long as it takes."""
        while True:
            try:
                self.connect()
                return
            except (OSError, GoneError):
                time.sleep(RETRY_S)

    @property
    def marked(self) -> list[int]:
        """The heads that the region says are in flight, first taken first."""
        assert self.region is not None
        return Part(self.region).marked()

    def close(self) -> None:
        """Hang up for good."""
        self.peer.close()
        self.ring.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sector_of(image: Path, sector: int) -> bytes:
    """What is stored."""
    with image.open("rb") as file:
        return os.pread(file.fileno(), 512, sector * 512)
