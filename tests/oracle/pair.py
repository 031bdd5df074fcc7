"""Both halves of a ring, and the truth about it beside them. Every step of a half is held against that truth."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import pytest
from tests.oracle.host import CELL, TABLE, Host
from tests.oracle.layout import F_INDIRECT_DESC, F_NOTIFY_ON_EMPTY, passed
from tests.oracle.memory import Words
from tests.oracle.ring import Device, Driver


@dataclass
class Chain:
    """A chain on its way to the device and back."""

    cell: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    content: bytes
    descriptors: int = 0
    head: int = -1
    answer: bytes = b""

    @property
    def room(self) -> int:
        return sum(length for _, length in self.writable)


class Pair:
    """A driver and a device. Methods are the steps that a schedule is made of; they raise where a half is wrong."""

    def __init__(self, host: Host, driver: str, device: str, base: int, rng: random.Random) -> None:
        self.host = host
        self.rng = rng
        self.layout = host.layout
        self.words = Words(host.buffer)
        self.driver = host.driver(driver, base, rng)
        self.device_kind = device
        self.device = host.device(device, base)
        self.watcher = Device(host.space, host.layout, base)
        self.cells = deque(range(host.layout.size))
        self.free = host.layout.size
        self.added: deque[Chain] = deque()
        self.available: deque[Chain] = deque()
        self.in_flight: list[Chain] = []
        self.pushed: deque[Chain] = deque()
        self.used: deque[Chain] = deque()
        # Indices that count on; the ring has the lowest 16 bits of them.
        self.avail_published = self.taken = self.used_published = self.reaped = base
        self.decided = False
        self.calls_off = self.kicks_off = False
        self.used_event = self.avail_event = 0
        self.operations = self.chains = self.calls = self.kicks = 0

    # -- the driver's steps ------------------------------------------------------------------------------------------

    def add(self, chain: Chain | None = None) -> None:
        """One more chain, of a random shape if it is not given; when it does not fit, the driver must say so."""
        if not self.cells:
            return
        chain = chain or self._shape()
        table = self._table_for(chain)
        chain.descriptors = 1 if table else len(chain.readable) + len(chain.writable)
        options: dict[str, int] = {}
        if table and isinstance(self.driver, Driver):
            most = min(len(chain.readable) + len(chain.writable) - 1, self.layout.size - 1)
            options["direct"] = direct = self.rng.randint(0, most)
            chain.descriptors = direct + 1
        if chain.descriptors > self.free:
            with pytest.raises(BlockingIOError):
                self.driver.add(chain.readable, chain.writable, table=table, **options)
        else:
            self.cells.remove(chain.cell)
            self._fill(chain)
            chain.head = self.driver.add(chain.readable, chain.writable, table=table, **options)
            self.added.append(chain)
            self.free -= chain.descriptors
        self._done()

    def publish_driver(self) -> None:
        """Shows the device what was added: the kick is due exactly when the device asked for it."""
        old, new = self.avail_published % 65536, (self.avail_published + len(self.added)) % 65536
        kicked = self.driver.publish()
        if not self.added:
            assert not kicked, "a kick for nothing"
        elif self.layout.event_idx:
            assert kicked == passed(self.avail_event, old, new), f"{old} to {new}, event {self.avail_event}"
        else:
            assert kicked == (not self.kicks_off)
        self.kicks += kicked
        for number, chain in enumerate(self.added):
            assert self.words.get(self.layout.avail_entry(old + number), 2) == chain.head
            self._watch(chain)
        self.avail_published += len(self.added)
        self.available.extend(self.added)
        self.added.clear()
        self._done()

    def reap(self) -> None:
        """Takes back all that was used: in the order in which it was used, with what was written."""
        reaped = self.driver.reap()
        assert reaped == [(chain.head, len(chain.answer)) for chain in self.used]
        for chain in self.used:
            got = b"".join(self.host.space.read(addr, length) for addr, length in chain.writable)
            assert got[: len(chain.answer)] == chain.answer
            self.free += chain.descriptors
            self.cells.append(chain.cell)
        self.reaped += len(self.used)
        self.chains += len(self.used)
        self.used.clear()
        self._done()

    def enable_calls(self) -> None:
        """Asks for a call after some more chains."""
        after = self.rng.choice((1, 1, 1, 2, 3, 7, self.layout.size))
        assert self.driver.enable_calls(after) == (len(self.used) >= after)
        self.calls_off = False
        self.used_event = (self.reaped + after - 1) % 65536
        self._done()

    def disable_calls(self) -> None:
        """Asks for no call; with EVENT_IDX that is an event which has passed."""
        self.driver.disable_calls()
        self.calls_off = True
        if self.layout.event_idx:
            self.used_event = self.words.get(self.layout.used_event, 2)
            assert 0 < (self.reaped - self.used_event) % 65536 <= 32768
        self._done()

    # -- the device's steps ------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Takes the next chain, which is the oldest one, and reads it."""
        taken = self.device.take()
        if not self.available:
            assert taken is None
        else:
            chain = self.available.popleft()
            assert taken == (chain.head, len(chain.content), chain.room, None)
            assert self.device.read(chain.head) == chain.content
            self.in_flight.append(chain)
            self.taken += 1
        self._done()

    def push(self) -> None:
        """Answers a chain, the oldest one or any; the driver must not see it yet."""
        if self.in_flight:
            chain = self.in_flight.pop(self.rng.choice((0, self.rng.randrange(len(self.in_flight)))))
            chain.answer = self.rng.randbytes(self.rng.randint(0, chain.room))
            assert self.device.write(chain.head, chain.answer) == len(chain.answer)
            self.device.push(chain.head, len(chain.answer))
            self.pushed.append(chain)
        self._done()

    def publish_device(self) -> None:
        """Shows the driver what was used: the call is due exactly when the driver asked for it."""
        old, new = self.used_published % 65536, (self.used_published + len(self.pushed)) % 65536
        called = self.device.publish()
        first, on_empty = not self.decided, self.layout.features & F_NOTIFY_ON_EMPTY
        if not self.pushed:
            assert not called, "a call for nothing"
        else:
            self.decided = True
            if on_empty and not self.in_flight and not self.available:
                assert called, "nothing is left"
            elif self.layout.event_idx:
                due = first or passed(self.used_event, old, new)
                assert called == due, f"{old} to {new}, event {self.used_event}, first {first}"
            else:
                assert called == (not self.calls_off)
        self.calls += called
        for number, chain in enumerate(self.pushed):
            assert self.words.get(self.layout.used_id(old + number), 4) == chain.head
            assert self.words.get(self.layout.used_len(old + number), 4) == len(chain.answer)
        self.used_published += len(self.pushed)
        self.used.extend(self.pushed)
        self.pushed.clear()
        self._done()

    def suppress_kicks(self) -> None:
        """The device looks by itself from now on."""
        self.device.suppress_kicks()
        self.kicks_off = not self.layout.event_idx
        self._done()

    def enable_kicks(self) -> None:
        """The device wants a kick for the next chain, and sees the one that came before it said so."""
        assert self.device.enable_kicks() == bool(self.available)
        self.kicks_off = False
        if self.layout.event_idx:
            self.avail_event = self.taken % 65536
        self._done()

    def restart(self) -> None:
        """Another device goes on where this one was stopped: nothing may be in flight then."""
        if not self.in_flight and not self.pushed:
            self.device = self.host.device(self.device_kind, self.device.base)
            self.decided = False
        self._done()

    def drain(self) -> None:
        """Everything goes over and comes back."""
        self.publish_driver()
        while self.available:
            self.take()
        while self.in_flight:
            self.push()
        self.publish_device()
        self.reap()
        assert self.driver.outstanding == 0
        assert self.driver.free == self.layout.size
        self.host.check_canaries()

    # -- what is checked after each step -----------------------------------------------------------------------------

    def _done(self) -> None:
        """Every word of the ring, and all that the halves tell of themselves, is as it must be."""
        self.operations += 1
        get, layout = self.words.get, self.layout
        assert get(layout.avail_idx, 2) == self.avail_published % 65536
        assert get(layout.used_idx, 2) == self.used_published % 65536
        if layout.event_idx:
            assert get(layout.avail_flags, 2) == get(layout.used_flags, 2) == 0
            assert get(layout.used_event, 2) == self.used_event
            assert get(layout.avail_event, 2) == self.avail_event
        else:
            assert get(layout.avail_flags, 2) == self.calls_off
            assert get(layout.used_flags, 2) == self.kicks_off
        assert self.device.in_flight == len(self.in_flight)
        assert self.device.base == self.taken % 65536
        assert self.device.used_index == self.used_published % 65536
        assert self.driver.free == self.free
        outstanding = (self.added, self.available, self.in_flight, self.pushed, self.used)
        assert self.driver.outstanding == sum(map(len, outstanding))

    def _watch(self, chain: Chain) -> None:
        """The chain in the ring is the one that was asked for, buffer for buffer."""
        seen = self.watcher.walk(chain.head)
        space = self.host.space
        for pieces, buffers in ((seen.readable, chain.readable), (seen.writable, chain.writable)):
            assert pieces == [piece for addr, length in buffers for piece in space.find(addr, length) or []]
        assert not seen.faults

    # -- chains ------------------------------------------------------------------------------------------------------

    def long(self, count: int) -> Chain:
        """A chain of ``count`` buffers: the same byte again and again, and one to write to."""
        start = self.host.cell(self.cells[0])
        content = self.rng.randbytes(1) * (count - 1)
        return Chain(self.cells[0], [(start, 1)] * (count - 1), [(start + CELL // 2, 5)], content)

    def _shape(self) -> Chain:
        rng = self.rng
        cell = self.cells[0]
        start, half = self.host.cell(cell), CELL // 2
        if rng.random() < 0.01:  # a long one, whose buffers are the same byte again and again
            count = rng.randint(1, min(self.layout.size, 300))
            return self.long(count)
        most = min(self.layout.size, 4)
        count = rng.randint(1, most)
        num_readable = rng.randint(0, count)
        readable = self._buffers(start, num_readable)
        writable = self._buffers(start + half, count - num_readable)
        return Chain(cell, readable, writable, rng.randbytes(sum(length for _, length in readable)))

    def _buffers(self, at: int, count: int) -> list[tuple[int, int]]:
        buffers = []
        for _ in range(count):
            length = self.rng.choice((0, 1, 2, 5, 8))
            buffers.append((at, length))
            at += length
        return buffers

    def _table_for(self, chain: Chain) -> tuple[int, int] | None:
        """Room for an indirect table, sometimes: (arena offset, guest address). In one piece for a native driver."""
        length = 16 * (len(chain.readable) + len(chain.writable))
        if not self.layout.features & F_INDIRECT_DESC or length > TABLE or self.rng.random() < 0.5:
            return None
        addr = self.host.table(chain.cell) + self.rng.randint(0, TABLE - length)
        pieces = self.host.space.find(addr, length)
        assert pieces is not None
        if len(pieces) > 1 and not isinstance(self.driver, Driver):
            return None
        return pieces[0][0], addr

    def _fill(self, chain: Chain) -> None:
        at = 0
        for addr, length in chain.readable:
            self.host.space.write(addr, chain.content[at : at + length])
            at += length
