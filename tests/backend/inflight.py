"""The in-flight region of one split queue as a person reads it in the specification. Touches the bytes it is given."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Final

from vhostuser._native import InflightRegion

ALIGN: Final = 64
HEADER: Final = struct.Struct("<QHHHH")  # features, version, desc_num, last_batch_head, used_idx
ENTRY: Final = struct.Struct("<B5xHQ")  # inflight, next, counter


def stride(size: int) -> int:
    """Bytes of the part of a queue of ``size``."""
    return -(-(HEADER.size + ENTRY.size * size) // ALIGN) * ALIGN


@dataclass
class Part:
    """The part of queue ``index`` of a region."""

    region: InflightRegion
    index: int = 0

    def __post_init__(self) -> None:
        self.bytes = mmap.mmap(self.region.fd, self.region.offset + self.region.size)
        self.start = self.region.offset + stride(self.region.queue_size) * self.index

    @property
    def header(self) -> tuple[int, int, int, int, int]:
        """features, version, desc_num, last_batch_head, used_idx."""
        return HEADER.unpack_from(self.bytes, self.start)

    def set_header(self, *, version: int = 1, desc_num: int, last_batch_head: int = 0, used_idx: int) -> None:
        HEADER.pack_into(self.bytes, self.start, 0, version, desc_num, last_batch_head, used_idx)

    @property
    def used_idx(self) -> int:
        return self.header[4]

    def entry(self, head: int) -> tuple[int, int, int]:
        """inflight, next, counter."""
        return ENTRY.unpack_from(self.bytes, self.start + HEADER.size + ENTRY.size * head)

    def set_entry(self, head: int, *, inflight: int, following: int = 0, counter: int = 0) -> None:
        ENTRY.pack_into(self.bytes, self.start + HEADER.size + ENTRY.size * head, inflight, following, counter)

    def marked(self) -> list[int]:
        """The heads in flight, first taken first."""
        heads = [head for head in range(self.region.queue_size) if self.entry(head)[0]]
        return sorted(heads, key=lambda head: self.entry(head)[2])
