"""A slow, obvious split ring, both halves, written from the specification (virtio: Split Virtqueues) and from no other
code. Nothing is cached, packed or masked: where the native ring computes, this one counts. Touches the ring's memory.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tests.oracle.layout import (
    F_INDIRECT_DESC,
    F_NOTIFY_ON_EMPTY,
    INDIRECT,
    NEXT,
    NO_INTERRUPT,
    NO_NOTIFY,
    WRITE,
    Descriptor,
    Layout,
    passed,
)
from tests.oracle.memory import Space, Words

TABLE_LIMIT = 4096
"""Entries of an indirect table that a device takes from a driver whose ring is shorter (a choice of ours)."""


class RingBroken(Exception):  # noqa: N818  what the driver did, not an error of this code
    """The driver published what cannot be: the device stops serving the ring. Says what its log line has to match."""


class DeviceLied(Exception):  # noqa: N818  likewise
    """The device used what cannot be."""


Buffers = Sequence[tuple[int, int]]
"""(guest address, length) of each buffer."""


class DriverHalf(Protocol):
    """What a test does with the driver's half, native or not."""

    def add(self, readable: Buffers, writable: Buffers, *, table: tuple[int, int] | None = None) -> int: ...
    def publish(self) -> bool: ...
    def reap(self) -> list[tuple[int, int]]: ...
    def enable_calls(self, after: int = 1) -> bool: ...
    def disable_calls(self) -> None: ...
    @property
    def free(self) -> int: ...
    @property
    def outstanding(self) -> int: ...


class DeviceHalf(Protocol):
    """What a test does with the device's half, native or not."""

    def take(self) -> tuple[int, int, int, str | None] | None: ...
    def read(self, head: int) -> bytes: ...
    def write(self, head: int, data: bytes) -> int: ...
    def push(self, head: int, written: int) -> None: ...
    def publish(self) -> bool: ...
    def suppress_kicks(self) -> None: ...
    def enable_kicks(self) -> bool: ...
    @property
    def base(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def used_index(self) -> int: ...


@dataclass
class Taken:
    """A chain as the device sees it."""

    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    readable_len: int = 0
    writable_len: int = 0
    faults: set[str] = field(default_factory=set)


class Device:
    """The device half."""

    def __init__(self, space: Space, layout: Layout, base: int) -> None:
        self._space = space
        self._words = Words(space.buffer)
        self._layout = layout
        self._next_avail = base
        self._next_used = self._published = self._words.get(layout.used_idx, 2)
        self._decided_once = False
        self.taken: dict[int, Taken] = {}

    def _available(self) -> int:
        """How many chains may be taken."""
        there = (self._words.get(self._layout.avail_idx, 2) - self._next_avail) % 65536
        if there > self._layout.size:
            raise RingBroken("jumped")
        return there

    def take(self) -> tuple[int, int, int, str | None] | None:
        if self._available() == 0:
            return None
        head = self._words.get(self._layout.avail_entry(self._next_avail), 2)
        if head >= self._layout.size:
            raise RingBroken("head .* is beyond the descriptor table")
        if head in self.taken:
            raise RingBroken("made available twice")
        chain = self.taken[head] = self.walk(head)
        self._next_avail = (self._next_avail + 1) % 65536
        return head, chain.readable_len, chain.writable_len, min(chain.faults, default=None)

    def walk(self, head: int) -> Taken:
        """The chain at ``head``, which is not taken by that."""
        layout, chain = self._layout, Taken()
        at, seen = head, set()
        while True:
            if at in seen:
                raise RingBroken("loops")
            seen.add(at)
            place = layout.desc + 16 * at
            entry = Descriptor.unpack(bytes(self._space.buffer[place : place + 16]))
            if entry.flags & INDIRECT:
                if not layout.features & F_INDIRECT_DESC or entry.flags & NEXT:
                    raise RingBroken("an indirect descriptor where none is allowed")
                self._walk_table(entry, chain)
                return chain
            self._buffer(entry, chain)
            if not entry.flags & NEXT:
                return chain
            at = entry.next
            if at >= layout.size:
                raise RingBroken("goes on at .*, beyond its descriptor table")

    def _walk_table(self, table: Descriptor, chain: Taken) -> None:
        num_entries, rest = divmod(table.length, 16)
        if rest or not 0 < num_entries <= max(TABLE_LIMIT, self._layout.size):
            raise RingBroken("has an indirect table of")
        pieces = self._space.find(table.addr, table.length)
        if pieces is None:
            chain.faults.add("unmapped")
            return
        data = self._space.load(pieces)
        at, seen = 0, set()
        while True:
            if at in seen:
                raise RingBroken("loops")
            seen.add(at)
            entry = Descriptor.unpack(data[16 * at : 16 * at + 16])
            if entry.flags & INDIRECT:
                raise RingBroken("an indirect descriptor where none is allowed")
            self._buffer(entry, chain)
            if not entry.flags & NEXT:
                return
            at = entry.next
            if at >= num_entries:
                raise RingBroken("goes on at .*, beyond its descriptor table")

    def _buffer(self, entry: Descriptor, chain: Taken) -> None:
        if entry.length == 0:
            return
        pieces = self._space.find(entry.addr, entry.length)
        if pieces is None:
            chain.faults.add("unmapped")
        if entry.flags & WRITE:
            chain.writable += pieces or []
            chain.writable_len += entry.length
        else:
            if chain.writable_len:
                chain.faults.add("order")
            chain.readable += pieces or []
            chain.readable_len += entry.length
        if chain.readable_len + chain.writable_len > 2**32:
            chain.faults.add("length")

    def read(self, head: int) -> bytes:
        return self._space.load(self.taken[head].readable)

    def write(self, head: int, data: bytes) -> int:
        return self._space.store(self.taken[head].writable, data)

    def push(self, head: int, written: int) -> None:
        del self.taken[head]
        self._words.set(self._layout.used_id(self._next_used), 4, head)
        self._words.set(self._layout.used_len(self._next_used), 4, written)
        self._next_used = (self._next_used + 1) % 65536

    def publish(self) -> bool:
        old, new = self._published, self._next_used
        if old == new:
            return False
        self._words.set(self._layout.used_idx, 2, new)
        self._published = new
        first, self._decided_once = not self._decided_once, True
        on_empty = self._layout.features & F_NOTIFY_ON_EMPTY and not self.taken and self._available() == 0
        if on_empty:
            return True
        if self._layout.event_idx:
            return first or passed(self._words.get(self._layout.used_event, 2), old, new)
        return not self._words.get(self._layout.avail_flags, 2) & NO_INTERRUPT

    def suppress_kicks(self) -> None:
        if not self._layout.event_idx:
            self._words.set(self._layout.used_flags, 2, NO_NOTIFY)

    def enable_kicks(self) -> bool:
        if self._layout.event_idx:
            self._words.set(self._layout.avail_event, 2, self._next_avail)
        else:
            self._words.set(self._layout.used_flags, 2, 0)
        return self._available() > 0

    @property
    def base(self) -> int:
        return self._next_avail

    @property
    def in_flight(self) -> int:
        return len(self.taken)

    @property
    def used_index(self) -> int:
        return self._published


class Driver:
    """The driver half. It picks descriptors, and the places in an indirect table, at random: a device may not care."""

    def __init__(self, space: Space, layout: Layout, base: int, rng: random.Random) -> None:
        self._space = space
        self._words = Words(space.buffer)
        self._layout = layout
        self._rng = rng
        for offset, length in layout.areas():
            space.buffer[offset : offset + length] = bytes(length)
        self._words.set(layout.avail_idx, 2, base)
        self._words.set(layout.used_idx, 2, base)
        self._free = list(range(layout.size))
        self._added = self._published = self._reaped = base
        self._chains: dict[int, tuple[list[int], int]] = {}  # descriptors and room of a chain, by its head
        self._unpublished: set[int] = set()

    def add(
        self, readable: Buffers, writable: Buffers, *, table: tuple[int, int] | None = None, direct: int = 0
    ) -> int:
        """Makes a chain; with ``table`` (an offset nobody needs here, a guest address) all but the first ``direct``
        buffers go there."""
        buffers = [(addr, length, 0) for addr, length in readable]
        buffers += [(addr, length, WRITE) for addr, length in writable]
        in_table = buffers[direct:] if table is not None else []
        entries = buffers[: len(buffers) - len(in_table)]
        if table is not None:
            order = list(range(1, len(in_table)))
            self._rng.shuffle(order)
            self._space.write(table[1], _linked([0, *order], in_table, len(in_table)))
            entries.append((table[1], 16 * len(in_table), INDIRECT))
        if len(entries) > len(self._free):
            raise BlockingIOError("no room")
        places = [self._free.pop(self._rng.randrange(len(self._free))) for _ in entries]
        for place, following, buffer in zip(places, [*places[1:], None], entries, strict=True):
            at = self._layout.desc + 16 * place
            self._space.buffer[at : at + 16] = _entry(buffer, following).pack()
        head = places[0]
        self._words.set(self._layout.avail_entry(self._added), 2, head)
        self._added = (self._added + 1) % 65536
        self._chains[head] = places, sum(length for _, length in writable)
        self._unpublished.add(head)
        return head

    def publish(self) -> bool:
        old, new = self._published, self._added
        if old == new:
            return False
        self._words.set(self._layout.avail_idx, 2, new)
        self._published = new
        self._unpublished.clear()
        if self._layout.event_idx:
            return passed(self._words.get(self._layout.avail_event, 2), old, new)
        return not self._words.get(self._layout.used_flags, 2) & NO_NOTIFY

    def _used(self) -> int:
        """How many chains the device has used and we have not reaped."""
        return (self._words.get(self._layout.used_idx, 2) - self._reaped) % 65536

    def reap(self) -> list[tuple[int, int]]:
        if self._used() > len(self._chains) - len(self._unpublished):
            raise DeviceLied("more chains than were outstanding")
        reaped = []
        for _ in range(self._used()):
            head = self._words.get(self._layout.used_id(self._reaped), 4)
            written = self._words.get(self._layout.used_len(self._reaped), 4)
            if head not in self._chains or head in self._unpublished:
                raise DeviceLied("a chain that is not outstanding")
            places, room = self._chains.pop(head)
            if written > room:
                raise DeviceLied("more bytes than there was room for")
            self._free += places
            self._reaped = (self._reaped + 1) % 65536
            reaped.append((head, written))
        return reaped

    def enable_calls(self, after: int = 1) -> bool:
        if self._layout.event_idx:
            self._words.set(self._layout.used_event, 2, (self._reaped + after - 1) % 65536)
        else:
            self._words.set(self._layout.avail_flags, 2, 0)
        return self._used() >= after

    def disable_calls(self) -> None:
        if self._layout.event_idx:
            self._words.set(self._layout.used_event, 2, (self._reaped - 1) % 65536)
        else:
            self._words.set(self._layout.avail_flags, 2, NO_INTERRUPT)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def outstanding(self) -> int:
        return len(self._chains)


def _entry(buffer: tuple[int, int, int], following: int | None) -> Descriptor:
    """The descriptor of (guest address, length, flags) that goes on at ``following``."""
    addr, length, flags = buffer
    return Descriptor(addr, length, flags | (0 if following is None else NEXT), following or 0)


def _linked(places: list[int], buffers: list[tuple[int, int, int]], num_entries: int) -> bytes:
    """A table of ``num_entries`` with ``buffers`` linked in it, each at its place."""
    table = [b""] * num_entries
    for place, following, buffer in zip(places, [*places[1:], None], buffers, strict=True):
        table[place] = _entry(buffer, following).pack()
    return b"".join(table)
