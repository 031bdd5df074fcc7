"""A disk in memory that answers requests as leniently or as strictly as the program it stands for. Touches nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from .ring import Chain

OK: Final = 0
IOERR: Final = 1
UNSUPP: Final = 2
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
HEADER: Final = struct.Struct("<IIQ")
SEGMENT: Final = struct.Struct("<QII")


@dataclass(slots=True)
class MemoryDisk:
    """Its bytes, and how it wants its requests framed."""

    size: int
    exact_framing: bool = False  # header alone in the first buffer, status alone in the last (SPDK)
    empty_io: int = OK  # what a read or write of nothing answers (SPDK: UNSUPP)
    odd_io: int = IOERR  # what a length that is no multiple of 512 answers (SPDK: UNSUPP)
    flush_sector: int = OK  # what a FLUSH with a sector answers (SPDK: IOERR)
    max_segments: int = 1  # of DISCARD and WRITE_ZEROES
    too_many_segments: int = UNSUPP
    max_sectors: int = 32768
    serial: bytes = b"stub"
    pad: bytes = b"\0"  # what GET_ID is filled up with (SPDK: spaces)
    used_length: Callable[[int, int], int] = lambda written, room: written + 1
    data: bytearray = field(default_factory=bytearray)
    framings: set[tuple[int, int]] = field(default_factory=set)  # seen: sizes of the first and of the last buffer

    def __post_init__(self) -> None:
        if not self.data:
            self.data = bytearray(self.size)

    def answer(self, chain: Chain) -> int:
        """Carry out the request and store its status; returns the used length."""
        if not chain.readable or not chain.writable:
            return 0
        first, last = chain.readable[0], chain.writable[-1]
        self.framings.add((len(first), len(last)))
        if self.exact_framing and (len(first) != HEADER.size or len(last) != 1):
            last[len(last) - 1] = UNSUPP
            return 1
        readable = b"".join(chain.readable)
        room = sum(len(buffer) for buffer in chain.writable) - 1
        status, data = self._carry_out(readable, room)
        last[len(last) - 1] = status
        _scatter(chain.writable, data)
        return self.used_length(len(data), room + 1)

    def _carry_out(self, readable: bytes, room: int) -> tuple[int, bytes]:
        if len(readable) < HEADER.size:
            return IOERR, b""
        kind, _, sector = HEADER.unpack_from(readable)
        content = readable[HEADER.size :]
        match kind:
            case 0:
                status = self._bounds(sector, room)
                return status, bytes(self.data[512 * sector : 512 * sector + room]) if status == OK else b""
            case 1:
                status = self._bounds(sector, len(content))
                if status == OK:
                    self.data[512 * sector : 512 * sector + len(content)] = content
                return status, b""
            case 4:
                return (self.flush_sector if sector else OK), b""
            case 8:
                return OK, self.serial[:20].ljust(20, self.pad)[:room]
            case 11 | 13:
                return self._zero(content), b""
        return UNSUPP, b""

    def _bounds(self, sector: int, length: int) -> int:
        if not length:
            return self.empty_io
        if length % 512:
            return self.odd_io
        return OK if 512 * sector + length <= self.size else IOERR

    def _zero(self, content: bytes) -> int:
        if not content or len(content) % SEGMENT.size:
            return IOERR
        segments = list(SEGMENT.iter_unpack(content))
        if len(segments) > self.max_segments:
            return self.too_many_segments
        for sector, count, flags in segments:
            if flags & ~1:
                return UNSUPP
            if count > self.max_sectors or 512 * (sector + count) > self.size:
                return IOERR
        for sector, count, _ in segments:
            self.data[512 * sector : 512 * (sector + count)] = bytes(512 * count)
        return OK


def _scatter(buffers: list[memoryview], data: bytes) -> None:
    for buffer in buffers:
        part, data = data[: len(buffer)], data[len(buffer) :]
        buffer[: len(part)] = part
