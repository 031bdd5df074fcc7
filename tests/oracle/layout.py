"""Where things are in a split ring, and what its bits mean (virtio: Split Virtqueues). Touches nothing."""

from __future__ import annotations

from dataclasses import dataclass

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1
F_NOTIFY_ON_EMPTY, F_INDIRECT_DESC, F_EVENT_IDX = 1 << 24, 1 << 28, 1 << 29


def passed(event: int, old: int, new: int) -> bool:
    """Whether an index that went from ``old`` to ``new``, step by step, left ``event`` behind."""
    index = old
    while index != new:
        if index == event:
            return True
        index = (index + 1) % 65536
    return False


@dataclass(frozen=True)
class Layout:
    """Where the three areas of a ring are in its buffer, and every field of them."""

    size: int
    desc: int
    avail: int
    used: int
    features: int

    @property
    def event_idx(self) -> bool:
        return bool(self.features & F_EVENT_IDX)

    @property
    def avail_flags(self) -> int:
        return self.avail

    @property
    def avail_idx(self) -> int:
        return self.avail + 2

    def avail_entry(self, index: int) -> int:
        return self.avail + 4 + 2 * (index % self.size)

    @property
    def used_event(self) -> int:
        return self.avail + 4 + 2 * self.size

    @property
    def used_flags(self) -> int:
        return self.used

    @property
    def used_idx(self) -> int:
        return self.used + 2

    def used_id(self, index: int) -> int:
        return self.used + 4 + 8 * (index % self.size)

    def used_len(self, index: int) -> int:
        return self.used_id(index) + 4

    @property
    def avail_event(self) -> int:
        return self.used + 4 + 8 * self.size

    def areas(self) -> list[tuple[int, int]]:
        """Offset and length of each area; the event words are there only with EVENT_IDX."""
        event = 2 if self.event_idx else 0
        return [
            (self.desc, 16 * self.size),
            (self.avail, 4 + 2 * self.size + event),
            (self.used, 4 + 8 * self.size + event),
        ]


@dataclass(frozen=True)
class Descriptor:
    """One entry of a descriptor table."""

    addr: int
    length: int
    flags: int
    next: int

    def pack(self) -> bytes:
        fields = ((self.addr, 8), (self.length, 4), (self.flags, 2), (self.next, 2))
        return b"".join(value.to_bytes(size, "little") for value, size in fields)

    @classmethod
    def unpack(cls, data: bytes) -> Descriptor:
        number = int.from_bytes
        return cls(
            number(data[:8], "little"),
            number(data[8:12], "little"),
            number(data[12:14], "little"),
            number(data[14:], "little"),
        )
