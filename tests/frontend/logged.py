"""A disk under a random load whose dirty log is begun, read, swapped and ended at random, over the public front-end.

Memory has parts that only the device writes: the used rings, and one for data and status bytes. Of these a copy is
made: whole when a log is begun, and of logged pages alone from then on. Once the rings have stopped it is the same.
Touches one connection and its shared memory.
"""

from __future__ import annotations

import random
import select
import struct
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from vhostuser._native import DriverRing
from vhostuser.frontend import (
    MOVABLE,
    DirtyPages,
    Endpoint,
    HostDevice,
    HostQueue,
    SharedMemory,
    plain_queue,
    ring_bytes,
)
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig
from vhostuser.virtio.features import RingFeature

PAGE: Final = 4096
WAIT_S: Final = 20.0
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
KINDS: Final = (IN, IN, IN, IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES)
SLOTS: Final = 512
"""Requests under way, each with a header and an indirect table of its own."""
DEVICE_BYTES: Final = 4 << 20
WANTED: Final = int(
    RingFeature.VERSION_1
    | BlkFeature.FLUSH
    | BlkFeature.DISCARD
    | BlkFeature.WRITE_ZEROES
    | BlkFeature.SEG_MAX
    | BlkFeature.MQ
)


@dataclass(frozen=True)
class Shape:
    """What a run is made of, beside chance."""

    seed: int
    features: int = 0
    sizes: tuple[int, ...] = (64,)
    steps: int = 60
    discards: bool = True

    @classmethod
    def drawn(cls, seed: int, *, steps: int = 60, most: int = 1024, queues: int = 4) -> Self:
        """One by chance."""
        rng = random.Random(seed)
        features = rng.choice((0, RingFeature.EVENT_IDX)) | rng.choice((0, RingFeature.INDIRECT_DESC))
        sizes = tuple(rng.choice([size for size in (16, 64, 256, 1024) if size <= most]) for _ in range(queues))
        return cls(seed, int(features), sizes[: rng.randint(1, queues)], steps)


@dataclass
class Seen:
    """What happened in a run."""

    answered: int = 0
    checks: int = 0
    pages: int = 0
    differing: set[int] = field(default_factory=set)


class LoggedDisk:
    """One run."""

    def __init__(self, endpoint: Endpoint, shape: Shape) -> None:
        self.seen = Seen()
        self._rng = random.Random(f"run {shape.seed}")
        self._steps = shape.steps
        with ExitStack() as stack:
            wanted = WANTED | shape.features
            self.device = stack.enter_context(HostDevice(endpoint, features=wanted, protocol_features=MOVABLE))
            self.device.realize()
            self._sectors = VirtioBlkConfig.unpack(self.device.read_config(0, 60)).capacity
            self._kinds = [kind for kind in KINDS if shape.discards or kind not in (DISCARD, WRITE_ZEROES)]
            rings = sum(ring_bytes(size) for size in shape.sizes)
            self.memory = SharedMemory(rings + 32 * SLOTS + 512 * SLOTS + (1 << 16), DEVICE_BYTES)
            self._view, self._base = self.memory.view, self.memory.guest_addr
            self.queues: list[HostQueue[DriverRing]] = []
            for index, size in enumerate(shape.sizes):
                queue = plain_queue(self.memory, index, size, features=self.device.features)
                stack.callback(queue.close)
                self.queues.append(queue)
            self._headers = self.memory.reserve(32 * SLOTS)
            self._tables = self.memory.reserve(512 * SLOTS)
            self._data = self.memory.reserve(1 << 16)
            self._view[self._data : self._data + (1 << 16)] = self._rng.randbytes(1 << 16)
            self._room = self.memory.size - DEVICE_BYTES
            areas = [(queue.areas[2], 6 + 8 * queue.size) for queue in self.queues]
            self._written = [*areas, (self._room, DEVICE_BYTES)]
            self._copy = bytearray(self.memory.size)
            self._free = list(range(SLOTS))
            self._taken: dict[tuple[int, int], int] = {}
            self.device.start(self.memory, self.queues)
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._resources.close()

    def run(self) -> Seen:
        """The whole run; it ends with a check."""
        device, rng = self.device, self._rng
        self.begin()
        for _ in range(self._steps):
            self.work()
            match rng.random():
                case chance if chance < 0.3:
                    self.copy(device.read_log())
                case chance if chance < 0.5:
                    self.copy(device.swap_log())
                case chance if chance < 0.6:
                    device.stop_log(rings_first=rng.random() < 0.5)
                    self.work()
                    self.begin()
                case chance if chance < 0.7:
                    self.check()
                    device.start(self.memory, self.queues)
        while self._taken:
            self.wait()
        self.check()
        return self.seen

    def begin(self) -> None:
        """Begin a log, then copy everything."""
        self.device.start_log()
        self._copy[:] = self._view

    def copy(self, dirty: DirtyPages) -> None:
        """Copy the pages that were logged."""
        self.seen.pages += len(dirty)
        for start, length in dirty.runs():
            at = start - self._base
            assert 0 <= at <= self.memory.size - length, "a page was logged that is not in memory"
            self._copy[at : at + length] = self._view[at : at + length]

    def check(self) -> None:
        """Stop the rings and compare."""
        self.device.stop()
        self.copy(self.device.read_log())
        self.seen.checks += 1
        for start, length in self._written:
            if self._copy[start : start + length] != self._view[start : start + length]:
                for at in range(start, start + length):
                    if self._copy[at] != self._view[at]:
                        self.seen.differing.add(self._base + at // PAGE * PAGE)
        assert not self.device.read_log(), "a stopped device writes nothing"
        for queue in self.queues:
            self._reap(queue)

    def work(self) -> None:
        """Some requests on every ring, and the answers that are there."""
        for queue in self.queues:
            for _ in range(self._rng.randrange(12)):
                self._make(queue)
            if queue.driver.publish():
                queue.notify()
            self._reap(queue)

    def wait(self) -> None:
        """Wait for some answer."""
        waiting = {index for index, _ in self._taken}
        queues = [queue for queue in self.queues if queue.index in waiting]
        more = [queue.driver.enable_calls() for queue in queues]
        if sum(self._reap(queue) for queue in queues) or any(more):
            return
        assert select.select([queue.call for queue in queues], [], [], WAIT_S)[0], "requests are not answered"
        for queue in queues:
            queue.called()

    def _make(self, queue: HostQueue[DriverRing]) -> None:
        if not self._free:
            return
        rng, slot = self._rng, self._free[-1]
        kind = rng.choice(self._kinds)
        sectors = rng.randint(1, 24)
        out_of_range = rng.random() < 0.05
        sector = rng.randrange(self._sectors - (0 if out_of_range else sectors))
        header = self._headers + 32 * slot
        self._view[header : header + 16] = struct.pack("<IIQ", kind, 0, sector)
        readable = [(self._base + header, 16)]
        if kind == OUT:
            readable.append((self._base + self._data + 512 * rng.randrange(100), 512 * sectors))
        elif kind in (DISCARD, WRITE_ZEROES):
            self._view[header + 16 : header + 32] = struct.pack("<QII", sector, 8, 0)
            readable.append((self._base + header + 16, 16))
        writable = self._pieces({IN: 512 * sectors, GET_ID: 20}.get(kind, 0) + 1)
        place = self._tables + 512 * slot
        indirect = self.device.features & RingFeature.INDIRECT_DESC and rng.random() < 0.7
        try:
            head = queue.driver.add(readable, writable, table=(place, self._base + place) if indirect else None)
        except BlockingIOError:
            return
        self._taken[queue.index, head] = self._free.pop()

    def _pieces(self, length: int) -> list[tuple[int, int]]:
        """Memory for ``length`` bytes in up to seven pieces anywhere, which may lie over each other."""
        pieces: list[tuple[int, int]] = []
        while length:
            piece = length if len(pieces) == 6 or self._rng.random() < 0.3 else self._rng.randint(1, length)
            at = self._room + self._rng.randrange(DEVICE_BYTES - piece)
            pieces.append((self._base + at, piece))
            length -= piece
        return pieces

    def _reap(self, queue: HostQueue[DriverRing]) -> bool:
        answers = queue.driver.reap()
        for head, _ in answers:
            self._free.append(self._taken.pop((queue.index, head)))
            self.seen.answered += 1
        if self._rng.random() < 0.3:
            queue.driver.enable_calls()
        return bool(answers)
