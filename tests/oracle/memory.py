"""Bytes that a ring lies in, and guest addresses in them. Touches the buffer it was given."""

from __future__ import annotations

from dataclasses import dataclass


class Words:
    """Little-endian numbers at byte offsets of a buffer (virtio: a split ring is little-endian)."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer

    def get(self, at: int, size: int) -> int:
        """The number in the ``size`` bytes at ``at``."""
        return int.from_bytes(self.buffer[at : at + size], "little")

    def set(self, at: int, size: int, value: int) -> None:
        """Stores ``value`` in the ``size`` bytes at ``at``."""
        self.buffer[at : at + size] = value.to_bytes(size, "little")


@dataclass(frozen=True)
class Region:
    """A run of guest addresses and where its bytes are in the buffer."""

    guest_addr: int
    size: int
    offset: int


class Space:
    """Guest memory: regions of a buffer, with holes between them."""

    def __init__(self, buffer: memoryview, regions: list[Region]) -> None:
        self.buffer = buffer
        self.regions = regions

    def find(self, addr: int, length: int) -> list[tuple[int, int]] | None:
        """The (offset, length) pieces behind a range, in order; None when a byte of it is nowhere."""
        pieces = []
        while length > 0:
            inside = [r for r in self.regions if r.guest_addr <= addr < r.guest_addr + r.size]
            if not inside:
                return None
            into = addr - inside[0].guest_addr
            here = min(length, inside[0].size - into)
            pieces.append((inside[0].offset + into, here))
            addr += here
            length -= here
        return pieces

    def load(self, pieces: list[tuple[int, int]]) -> bytes:
        """The bytes of ``pieces``, one after the other."""
        return b"".join(self.buffer[offset : offset + length] for offset, length in pieces)

    def store(self, pieces: list[tuple[int, int]], data: bytes) -> int:
        """Puts ``data`` into ``pieces``; returns how many bytes fitted."""
        stored = 0
        for offset, length in pieces:
            part = data[stored : stored + length]
            self.buffer[offset : offset + len(part)] = part
            stored += len(part)
        return stored

    def read(self, addr: int, length: int) -> bytes:
        """A copy of a range that is mapped."""
        pieces = self.find(addr, length)
        assert pieces is not None, f"{length} bytes at {addr:#x} are not mapped"
        return self.load(pieces)

    def write(self, addr: int, data: bytes) -> None:
        """Fills a range that is mapped."""
        pieces = self.find(addr, len(data))
        assert pieces is not None, f"{len(data)} bytes at {addr:#x} are not mapped"
        self.store(pieces, data)
