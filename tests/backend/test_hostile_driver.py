"""What a guest may do to its rings while they are served: nobody else notices, and the back-end goes on.

One ring belongs to the hostile driver. The witness, another ring of the same disk and the same worker, has to be served
all the time.
"""

from __future__ import annotations

import os
import random
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from struct import pack, unpack_from

import pytest
from tests.backend.frontend import INDIRECT_EVENT_V1, WAIT_S, Frontend, GuestRam, GuestRing

from vhostuser.backend import Server
from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.protocol import F_PROTOCOL_FEATURES, FrontendRequest
from vhostuser.transport import listen

Req = FrontendRequest
IN, OUT = 0, 1
NEXT, WRITE, INDIRECT = 1, 2, 4
WITNESSED = 2000
"""The sector that the witness uses."""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Frontend]:
    """A front-end of a memory disk of 1 MiB with two rings on one worker."""
    where = str(tmp_path / "disk.sock")
    with MemoryDisk(1 << 20) as disk:
        device = BlockDevice(disk, num_queues=2, num_workers=1)
        with Server(device, listen(where)), Frontend.connect(where) as connected:
            yield connected
        device.close()


class Stage:
    """Two rings in one memory: the hostile driver writes into it as it likes."""

    def __init__(self, peer: Frontend, size: int = 16) -> None:
        self.peer = peer
        features = peer.negotiate(INDIRECT_EVENT_V1 | F_PROTOCOL_FEATURES)
        self.ram = GuestRam()
        self.ram.share(peer)
        self.own = self.ram.SCRATCH + (1 << 20)
        """Where the hostile requests are: the witness has its own at SCRATCH."""
        self.bytes = memoryview(self.ram.arena)
        self.ram.room(4096, 4096)
        self.hostile = GuestRing(self.ram, 0, size, features)
        self.ram.room(4096, 4096)  # what is written over the hostile ring does not reach the other one
        self.witness = GuestRing(self.ram, 1, size, features)
        self.hostile.start(peer)
        self.witness.start(peer)

    def store(self, at: int, data: bytes) -> None:
        """Write into guest memory."""
        self.bytes[at : at + len(data)] = data

    def descriptor(self, at: int, addr: int, length: int, flags: int, following: int = 0) -> None:
        """Write one descriptor of the hostile ring."""
        self.store(self.hostile.places[0] + 16 * at, pack("<QIHH", addr, length, flags, following))

    def request(self, kind: int, sector: int) -> int:
        """A request header in guest memory; returns where."""
        header = self.own + (1 << 16)
        self.store(header, pack("<IIQ", kind, 0, sector))
        return header

    def offer(self, heads: tuple[int, ...] = (0,), used_event: int | None = None) -> None:
        """Make heads of the hostile ring available, without the help of a driver that knows better, and kick."""
        avail = self.hostile.places[1]
        self.store(avail + 4 + 2 * self.hostile.size, pack("<H", self.used() if used_event is None else used_event))
        (index,) = unpack_from("<H", self.bytes, avail + 2)
        for number, head in enumerate(heads):
            self.store(avail + 4 + 2 * ((index + number) % self.hostile.size), pack("<H", head))
        self.store(avail + 2, pack("<H", (index + len(heads)) % 65536))
        os.eventfd_write(self.hostile.kick, 1)

    def used(self) -> int:
        """The used index of the hostile ring."""
        return int(unpack_from("<H", self.bytes, self.hostile.places[2] + 2)[0])

    def settle(self) -> None:
        """Return once the hostile ring has nothing more to say: it called, or it broke."""
        assert select.select([self.hostile.call, self.hostile.err], [], [], WAIT_S)[0], "neither served nor broken"

    def broken(self) -> bool:
        """Whether the hostile ring was reported as broken."""
        return bool(select.select([self.hostile.err], [], [], 0)[0])

    def bear_witness(self) -> None:
        """The other ring is served, and rightly."""
        data = random.randbytes(512)
        assert self.witness.request(OUT, WITNESSED, data) == (0, b"")
        assert self.witness.request(IN, WITNESSED, room=512) == (0, data)

    def close(self) -> None:
        """Both rings stop as if nothing had been."""
        for ring in (self.hostile, self.witness):
            ring.stop(self.peer)
            ring.close()


@pytest.fixture
def stage(peer: Frontend) -> Iterator[Stage]:
    made = Stage(peer)
    yield made
    made.bear_witness()
    made.close()


def test_an_indirect_table_in_the_ring_s_own_memory_is_read_once_and_harms_nobody(stage: Stage) -> None:
    desc, avail, used = stage.hostile.places
    header = stage.request(IN, 0)
    stage.descriptor(1, header, 16, NEXT, 1)
    stage.descriptor(2, stage.own, 513, WRITE)
    for table, length in ((desc + 16, 32), (desc, 16), (avail, 32), (used, 32)):
        stage.descriptor(0, table, length, INDIRECT)
        stage.offer()
        stage.settle()
        stage.bear_witness()
        if stage.broken():
            return
    pytest.fail("a table that is its own entry was taken")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_data_read_over_the_ring_itself_is_the_guest_s_own_loss(stage: Stage, place: int) -> None:
    stage.descriptor(0, stage.request(IN, 0), 16, NEXT, 1)
    stage.descriptor(1, stage.hostile.places[place] & ~511, 1024, NEXT | WRITE, 2)
    stage.descriptor(2, stage.own, 1, WRITE)
    stage.offer()
    stage.offer((1,))
    stage.bear_witness()


def test_buffers_that_are_one_and_the_same_place_are_garbage_and_no_more(stage: Stage) -> None:
    header = stage.request(IN, 0)
    for status in (header, header + 15, header + 16):
        stage.request(IN, 0)
        stage.descriptor(0, header, 16, NEXT, 1)
        stage.descriptor(1, header, 512, NEXT | WRITE, 2)
        stage.descriptor(2, status, 1, WRITE)
        before = stage.used()
        stage.offer()
        stage.settle()
        os.eventfd_read(stage.hostile.call)
        assert stage.used() == before + 1
        assert not stage.broken()


def test_a_ring_that_is_rewritten_while_it_is_read_costs_nobody_else_anything(stage: Stage) -> None:
    rng, enough = random.Random(7), threading.Event()
    desc, avail, _ = stage.hostile.places
    header = stage.request(OUT, 0)

    def rewrite() -> None:
        # Addresses stay: it is the guest's own affair to have the disk write over its other ring.
        while not enough.is_set():
            descriptor = desc + 16 * rng.randrange(16) + 8
            where = rng.choice((descriptor, descriptor + 4, descriptor + 6, header, avail + 2 * rng.randrange(18)))
            stage.store(where, rng.randbytes(2))

    for head in range(16):
        stage.descriptor(head, header, 16, NEXT, (head + 1) % 16)
    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(60):
            stage.offer(tuple(rng.randrange(16) for _ in range(4)))
            stage.bear_witness()
            if stage.broken():  # and begin anew
                os.eventfd_read(stage.hostile.err)
                stage.hostile.stop(stage.peer)
                stage.store(stage.hostile.places[1] + 2, stage.bytes[stage.hostile.places[2] + 2 :][:2].tobytes())
                stage.hostile.start(stage.peer, base=stage.used())
    finally:
        enough.set()
        writer.join()


def test_a_storm_of_kicks_without_a_chain_is_borne(stage: Stage) -> None:
    for number in range(20_000):
        os.eventfd_write(stage.hostile.kick, 1)
        if number % 2000 == 0:
            stage.bear_witness()
    assert not stage.broken()
    stage.descriptor(0, stage.request(IN, 0), 16, NEXT, 1)
    stage.descriptor(1, stage.own, 513, WRITE)
    stage.offer()
    stage.settle()
    assert stage.used() == 1


def test_a_used_event_that_never_comes_silences_only_who_asked_for_it(stage: Stage) -> None:
    stage.descriptor(0, stage.request(IN, 0), 16, NEXT, 1)
    stage.descriptor(1, stage.own, 513, WRITE)
    stage.offer()
    stage.settle()
    os.eventfd_read(stage.hostile.call)
    for event in (0x8000, 0xFFFF, 77):
        before = stage.used()
        stage.offer(used_event=event)
        stage.bear_witness()  # the same worker: it has seen the other ring, too
        stage.bear_witness()
        assert stage.used() == before + 1, "it is served, called or not"
    assert not select.select([stage.hostile.call], [], [], 0)[0]


def test_a_ring_that_is_always_full_leaves_the_other_one_its_turn(peer: Frontend) -> None:
    """The other ring's write takes its data out of the full ring's used entries: that says when it was served."""
    size = 32768
    features = peer.negotiate(1 << 32)
    ram = GuestRam(8 << 20)
    ram.share(peer)
    full, other = GuestRing(ram, 0, size, features), GuestRing(ram, 1, 16, features)
    view, header = memoryview(ram.arena), 4 << 20
    view[header : header + 16] = pack("<IIQ", IN, 0, 0)
    view[header + 16 : header + 32] = pack("<IIQ", OUT, 0, 0)
    desc, avail, used = full.places
    # Every chain is the same: the header, and room for 4 KiB. A chain begins at each descriptor but the last.
    view[desc : desc + 16 * size] = pack("<QIHH", header, 16, NEXT, size - 1) * size
    view[desc + 16 * (size - 1) : desc + 16 * size] = pack("<QIHH", header + 4096, 4097, WRITE, 0)
    view[avail + 4 : avail + 4 + 2 * (size - 1)] = b"".join(pack("<H", head) for head in range(size - 1))
    full.start(peer)
    other.start(peer)
    other.driver.add([(header + 16, 16), (used + 4 + 8 * 1024, 512)], [(header + 64, 1)])
    other.driver.publish()
    view[avail + 2 : avail + 4] = pack("<H", size - 1)
    os.eventfd_write(full.kick, 1)  # the other ring is not kicked: it is looked at in passing
    other.wait()
    assert view[header + 64] == 0
    while unpack_from("<H", view, used + 2)[0] != size - 1:
        assert select.select([full.call], [], [], WAIT_S)[0], "the ring is not worked off"
        os.eventfd_read(full.call)
    full.stop(peer)
    assert other.request(IN, 0, room=512) == (0, bytes(512)), "1024 chains went first"
    for ring in (full, other):
        ring.close()
