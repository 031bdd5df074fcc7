"""GET_VRING_BASE_INFLIGHT: what storage has not got at a stop stays in the region, for whoever serves the ring next."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.backend.frontend import INDIRECT_EVENT_V1, Frontend, GuestRam, GuestRing
from tests.backend.inflight import Part

from vhostuser._native import InflightRegion
from vhostuser.backend import Server
from vhostuser.backend.device import PROTOCOL_FEATURES
from vhostuser.blk import BlockDevice, ErrorAction, ErrorPolicy, RateLimit
from vhostuser.disks import FileDisk
from vhostuser.disks.faulty import Faults, FaultyDisk
from vhostuser.protocol import FrontendRequest, Inflight, ProtocolFeature
from vhostuser.transport import listen

Req = FrontendRequest
OUT, OK, IOERR = 1, 0, 1
NEVER = 0xFF
SIZE = 16
CELL = 1024
HELD = ErrorPolicy(on_error=ErrorAction.HOLD)
BROKEN = Faults(error_write=1.0)


class Guest:
    """A ring, its region, and the writes of one sector each that were put into it."""

    def __init__(self) -> None:
        self.ram = GuestRam()
        self.ring = GuestRing(self.ram, 0, SIZE, INDIRECT_EVENT_V1)
        self.region = InflightRegion.create(1, SIZE)
        self.part = Part(self.region)
        self.heads: list[int] = []

    def connect(
        self, where: str, stack: ExitStack, *, base: int = 0, tracked: bool = True, leaving: bool = True
    ) -> Frontend:
        peer = stack.enter_context(Frontend.connect(where))
        bit = ProtocolFeature.GET_VRING_BASE_INFLIGHT
        peer.negotiate(protocol=PROTOCOL_FEATURES if leaving else PROTOCOL_FEATURES & ~bit)
        if tracked:
            peer.do(Req.SET_INFLIGHT_FD, Inflight(self.region.size, 0, 1, SIZE), [self.region.fd])
        self.ram.share(peer)
        self.ring.start(peer, base=base)
        return peer

    def write(self, count: int) -> None:
        for number in range(len(self.heads), len(self.heads) + count):
            at = self.ram.scratch + number * CELL
            view = memoryview(self.ram.arena)
            view[at : at + 16] = OUT.to_bytes(8, "little") + number.to_bytes(8, "little")
            view[at + 16 : at + 528] = bytes([number + 1]) * 512
            view[at + 528] = NEVER
            self.heads.append(self.ring.driver.add([(at, 528)], [(at + 528, 1)]))
        self.ring.driver.publish()
        os.eventfd_write(self.ring.kick, 1)

    @property
    def statuses(self) -> list[int]:
        return [memoryview(self.ram.arena)[self.ram.scratch + number * CELL + 528] for number in range(len(self.heads))]

    def answered(self, count: int) -> list[int]:
        heads: list[int] = []
        while len(heads) < count:
            heads += [head for head, _ in self.ring.wait()]
        return heads

    def memory(self) -> bytes:
        return bytes(memoryview(self.ram.arena))


class Backend:
    """A disk that fails every write and holds it, or limits how many it takes; or one that is well."""

    def __init__(
        self, image: Path, stack: ExitStack, *, name: str, faults: Faults | None = None, limit: RateLimit | None = None,
        incoming: bool = False,
    ) -> None:  # fmt: skip
        self.where = str(image.with_name(name))
        file = FileDisk(image, incoming=incoming, lock_timeout_s=0.1)
        disk = stack.enter_context(FaultyDisk(file, faults) if faults is not None else file)
        self.device = BlockDevice(disk, errors=HELD, rate_limit=limit)
        stack.callback(self.device.close)
        stack.enter_context(Server(self.device, listen(self.where), drain_timeout_s=0.3))

    def wait_for(self, key: str, count: int) -> None:
        while self.device.statistics()[0][key] != count:
            select.select([], [], [], 0.001)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def guest(stack: ExitStack) -> Guest:
    made = Guest()
    stack.callback(made.ring.close)
    return made


def stored(image: Path, count: int) -> list[int]:
    data = image.read_bytes()
    return [data[number * 512] for number in range(count)]


@pytest.mark.covers("VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT")
def test_what_is_held_at_a_stop_is_answered_once_by_another_back_end(
    image: Path, stack: ExitStack, guest: Guest
) -> None:
    source = Backend(image, stack, name="a.sock", faults=BROKEN)
    peer = guest.connect(source.where, stack)
    guest.write(6)
    source.wait_for("held", 6)
    destination = Backend(image, stack, name="b.sock", incoming=True)
    assert guest.ring.stop(peer) == 6, "what stays in the region counts as taken"
    assert guest.part.marked() == guest.heads
    assert guest.statuses == [NEVER] * 6
    assert guest.ring.driver.reap() == []
    peer = guest.connect(destination.where, stack, base=6)
    assert sorted(guest.answered(6)) == sorted(guest.heads)
    assert guest.statuses == [OK] * 6
    assert stored(image, 6) == [1, 2, 3, 4, 5, 6]
    assert guest.ring.stop(peer) == 6
    assert guest.part.marked() == []
    assert guest.ring.driver.reap() == []


def test_nothing_is_written_for_the_ring_once_its_base_is_told(image: Path, stack: ExitStack, guest: Guest) -> None:
    source = Backend(image, stack, name="a.sock", faults=BROKEN)
    peer = guest.connect(source.where, stack)
    guest.write(5)
    source.wait_for("held", 5)
    guest.ring.stop(peer)
    before, region, content = guest.memory(), bytes(guest.part.bytes), image.read_bytes()
    if select.select([guest.ring.call], [], [], 0)[0]:
        os.eventfd_read(guest.ring.call)
    assert source.device.retry() == 0
    assert source.device.fail() == 0
    peer.barrier()
    assert (guest.memory(), bytes(guest.part.bytes), image.read_bytes()) == (before, region, content)
    assert not select.select([guest.ring.call, guest.ring.err], [], [], 0)[0]


def test_the_same_back_end_goes_on_with_what_it_left(image: Path, stack: ExitStack, guest: Guest) -> None:
    source = Backend(image, stack, name="a.sock", faults=Faults(error_write=1.0, error_limit=4))
    peer = guest.connect(source.where, stack)
    guest.write(4)
    source.wait_for("held", 4)
    base = guest.ring.stop(peer)
    guest.ring.start(peer, base=base)
    assert sorted(guest.answered(4)) == sorted(guest.heads)
    assert guest.statuses == [OK] * 4


def test_what_a_limit_holds_back_is_not_taken_and_is_served_by_the_next_one(
    image: Path, stack: ExitStack, guest: Guest
) -> None:
    source = Backend(image, stack, name="a.sock", limit=RateLimit(iops=10))
    peer = guest.connect(source.where, stack)
    guest.write(6)
    done = guest.ring.wait()
    destination = Backend(image, stack, name="b.sock", incoming=True)
    base = guest.ring.stop(peer)
    done += guest.ring.driver.reap()
    assert base == len(done) < 6
    guest.connect(destination.where, stack, base=base)
    done += [(head, 0) for head in guest.answered(6 - len(done))]
    assert sorted(head for head, _ in done) == sorted(guest.heads)
    assert guest.statuses == [OK] * 6
    assert stored(image, 6) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("without", ["region", "feature"])
def test_without_a_region_or_the_feature_everything_taken_is_answered(
    image: Path, stack: ExitStack, guest: Guest, without: str
) -> None:
    source = Backend(image, stack, name="a.sock", faults=BROKEN)
    peer = guest.connect(source.where, stack, tracked=without != "region", leaving=without != "feature")
    guest.write(3)
    source.wait_for("held", 3)
    assert guest.ring.stop(peer) == 3
    assert sorted(head for head, _ in guest.ring.driver.reap()) == sorted(guest.heads)
    assert guest.statuses == [IOERR] * 3
    assert guest.part.marked() == []


def test_a_region_told_of_while_the_ring_runs_is_none_of_that_ring(image: Path, stack: ExitStack, guest: Guest) -> None:
    source = Backend(image, stack, name="a.sock", faults=BROKEN)
    peer = guest.connect(source.where, stack, tracked=False)
    peer.do(Req.SET_INFLIGHT_FD, Inflight(guest.region.size, 0, 1, SIZE), [guest.region.fd])
    guest.write(2)
    source.wait_for("held", 2)
    assert guest.ring.stop(peer) == 2
    assert guest.statuses == [IOERR] * 2, "nothing else would keep them"
