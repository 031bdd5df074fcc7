"""The device half of a split ring, slow and plain, over a front-end's memory. Touches mapped files and eventfds."""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field
from typing import Final

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
NO_INTERRUPT: Final = 1
EVENT_IDX: Final = 1 << 29
DESCRIPTOR: Final = struct.Struct("<QIHH")
USED: Final = struct.Struct("<II")
U16: Final = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class Region:
    """One region of the memory table, mapped."""

    guest_addr: int
    size: int
    user_addr: int
    view: memoryview


class Memory:
    """The memory table of a front-end."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, fields: tuple[int, ...], fd: int) -> None:
        """Map one more region, given in the fields of its message; takes ``fd``."""
        guest_addr, size, user_addr, offset = fields
        try:
            mapping = mmap.mmap(fd, size + offset, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
        self.regions.append(Region(guest_addr, size, user_addr, memoryview(mapping)[offset : offset + size]))

    def guest(self, addr: int, size: int) -> memoryview:
        """``size`` bytes at a guest address; raises `LookupError` when they are not in one region."""
        for region in self.regions:
            if region.guest_addr <= addr and addr + size <= region.guest_addr + region.size:
                return region.view[addr - region.guest_addr :][:size]
        raise LookupError(f"no guest memory at {addr:#x}+{size:#x}")

    def user(self, addr: int, size: int) -> memoryview:
        """``size`` bytes at a user address; raises `LookupError` when they are not in one region."""
        for region in self.regions:
            if region.user_addr <= addr and addr + size <= region.user_addr + region.size:
                return region.view[addr - region.user_addr :][:size]
        raise LookupError(f"no user memory at {addr:#x}+{size:#x}")


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain, as its two lists of buffers."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


@dataclass(slots=True)
class Ring:
    """One ring with all that was said about it."""

    num: int = 0
    addr: tuple[int, int, int] | None = None  # descriptors, used, available: user addresses
    base: int = 0
    kick: int | None = None
    call: int | None = None
    enabled: bool = False
    features: int = 0
    memory: Memory = field(default_factory=Memory)

    def ready(self) -> bool:
        """Whether it can be served."""
        return bool(self.num and self.addr and self.kick is not None and self.enabled and self.memory.regions)

    def _areas(self) -> tuple[memoryview, memoryview, memoryview]:
        assert self.addr is not None
        descriptors, used, available = self.addr
        memory = self.memory
        return (
            memory.user(descriptors, 16 * self.num),
            memory.user(used, 6 + 8 * self.num),
            memory.user(available, 6 + 2 * self.num),
        )

    def take(self) -> Chain | None:
        """The next chain, or None."""
        descriptors, _, available = self._areas()
        if U16.unpack_from(available, 2)[0] == self.base:
            return None
        (head,) = U16.unpack_from(available, 4 + 2 * (self.base % self.num))
        self.base = (self.base + 1) & 0xFFFF
        chain = Chain(head, [], [])
        self._walk(chain, descriptors, head)
        return chain

    def _walk(self, chain: Chain, table: memoryview, slot: int) -> None:
        for _ in range(len(table) // 16):
            addr, size, flags, following = DESCRIPTOR.unpack_from(table, 16 * slot)
            if flags & INDIRECT:
                self._walk(chain, self.memory.guest(addr, size), 0)
                return
            (chain.writable if flags & WRITE else chain.readable).append(self.memory.guest(addr, size))
            if not flags & NEXT:
                return
            slot = following
        raise LookupError("a chain without an end")

    def give(self, head: int, written: int) -> None:
        """Give a chain back and notify as the driver asked."""
        _, used, available = self._areas()
        (index,) = U16.unpack_from(used, 2)
        USED.pack_into(used, 4 + 8 * (index % self.num), head, written)
        U16.pack_into(used, 2, (index + 1) & 0xFFFF)
        if self.features & EVENT_IDX:
            (event,) = U16.unpack_from(available, 4 + 2 * self.num)
            wanted = event == index
        else:
            wanted = not U16.unpack_from(available, 0)[0] & NO_INTERRUPT
        if wanted and self.call is not None:
            os.write(self.call, (1).to_bytes(8, "little"))

    def ask_for_kicks(self) -> bool:
        """Have the driver kick for the next chain; True when there is one already."""
        _, used, available = self._areas()
        if self.features & EVENT_IDX:
            U16.pack_into(used, 4 + 8 * self.num, self.base)
        return bool(U16.unpack_from(available, 2)[0] != self.base)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.kick, self.call):
            if fd is not None:
                os.close(fd)
        self.kick = self.call = None
