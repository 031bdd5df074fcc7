"""Memory for one ring and its buffers, and the halves over it, native or in Python. Touches one arena."""

from __future__ import annotations

import random
from typing import Final

from tests.oracle.layout import Layout
from tests.oracle.memory import Region, Space
from tests.oracle.ring import Device, DeviceHalf, Driver, DriverHalf

from vhostuser._native import Arena, DeviceRing, DriverRing, GuestMemory

CANARY: Final = 0xA5
"""What lies around the areas: nobody may change it, and a word read from there is a wrong one."""

CELL: Final = 64
"""Bytes for the buffers of one chain."""

TABLE: Final = 256
"""Bytes for the indirect table of one chain, wherever in them it begins."""

GUEST: Final = 0x4000_0007
"""Where the guest sees the first cell: regions need no alignment."""

USER: Final = 0x7F12_3456_7000
GAP: Final = 4096


def up(offset: int, align: int) -> int:
    """The first multiple of ``align`` from ``offset`` on."""
    return -(-offset // align) * align


class Host:
    """An arena with a ring, and ``size`` cells and tables in three adjacent guest regions that are apart in the arena.

    Two of the regions meet within a cell, two within a table.
    """

    def __init__(self, size: int, features: int) -> None:
        desc = 48
        avail = up(desc + 16 * size + 8, 4) + 2
        used = up(avail + 6 + 2 * size + 8, 8) + 4
        end = used + 6 + 8 * size + 8
        self.layout = Layout(size, desc, avail, used, features)
        cells = size * CELL
        tables = size * TABLE
        cuts = [0, cells // 2 + 21, cells + tables // 2 + 19, cells + tables]
        starts = [up(end, 4096) + 5 + number * GAP for number in range(3)]
        regions = [
            Region(GUEST + low, high - low, start + low)
            for low, high, start in zip(cuts, cuts[1:], starts, strict=False)
        ]
        self.arena = Arena(regions[-1].offset + regions[-1].size + GAP)
        self.buffer = memoryview(self.arena)
        self.space = Space(self.buffer, regions)
        self.buffer[:end] = bytes([CANARY]) * end
        self._end = end
        table = [(0x1000, end, USER, 0, self.arena.fd)]
        for number, region in enumerate(regions):
            user_addr = USER + (number + 1) * 0x1000_0000 + 0x123
            table.append((region.guest_addr, region.size, user_addr, region.offset, self.arena.fd))
        self.memory = GuestMemory(table)

    def cell(self, number: int) -> int:
        """The guest address of a cell."""
        return GUEST + number * CELL

    def table(self, number: int) -> int:
        """The guest address of a table."""
        return GUEST + self.layout.size * CELL + number * TABLE

    def driver(self, kind: str, base: int, rng: random.Random) -> DriverHalf:
        """A driver's half that starts at ``base``: the ring is zeroed by that."""
        if kind == "python":
            return Driver(self.space, self.layout, base, rng)
        at = self.layout
        return DriverRing(
            self.arena, size=at.size, desc=at.desc, avail=at.avail, used=at.used, features=at.features, base=base
        )

    def device(self, kind: str, base: int) -> DeviceHalf:
        """A device's half whose next chain is at ``base``."""
        if kind == "python":
            return Device(self.space, self.layout, base)
        at = self.layout
        return DeviceRing(
            self.memory,
            size=at.size,
            desc=USER + at.desc,
            avail=USER + at.avail,
            used=USER + at.used,
            features=at.features,
            base=base,
        )

    def check_canaries(self) -> None:
        """Nothing was written between the areas of the ring; an event word that was not negotiated lies there, too."""
        around = bytearray(self.buffer[: self._end])
        for offset, length in self.layout.areas():
            around[offset : offset + length] = bytes([CANARY]) * length
        assert around == bytes([CANARY]) * self._end
