"""The dirty log: a copy of guest memory that is made of logged pages alone is the same as guest memory."""

from __future__ import annotations

import os
import random
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from tests.backend.frontend import USER_BASE, WAIT_S, Frontend, GoneError, GuestRam, GuestRing

from vhostuser._native import DirtyLog, DriverRing
from vhostuser.backend import Server
from vhostuser.blk import BlockDevice
from vhostuser.disks import Disk, FileDisk, MemoryDisk
from vhostuser.disks.faulty import Faults, FaultyDisk
from vhostuser.protocol import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    FrontendRequest,
    Inflight,
    Log,
    ProtocolFeature,
    VringAddr,
    VringFlag,
)
from vhostuser.transport import listen

Req = FrontendRequest
PAGE: Final = 4096
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
INDIRECT, EVENT = 1 << 28, 1 << 29
DEVICE: Final = 2 << 20
"""From here on the device writes guest memory, and nobody else; below, only the driver does."""
SLOTS: Final = 2048
"""Requests under way, each with a header and an indirect table of its own."""


class Ram(GuestRam):
    """Guest memory whose upper part is the device's: used rings, data and status bytes."""

    def __init__(self) -> None:
        super().__init__(8 << 20)
        self.view = memoryview(self.arena)
        self._next_device = DEVICE

    def device_room(self, size: int, align: int = 1) -> int:
        place = -(-self._next_device // align) * align
        self._next_device = place + size
        return place


class LoggedRing(GuestRing):
    """A ring whose used ring is apart from what the driver writes, and crosses pages."""

    def __init__(
        self, memory: Ram, index: int, size: int, features: int, *, base: int = 0, parted: bool = False
    ) -> None:
        """``parted``: flags and index of the used ring end a page, and its entries begin the next one."""
        super().__init__(memory, index, size, features)
        desc, avail, _ = self.places
        used = memory.device_room(6 + 8 * size, 4) + 8  # it begins wherever the one before ended
        memory.device_room(16)
        if parted:
            used = memory.device_room(2 * PAGE + 8 * size, PAGE) + PAGE - 4
        self.places = (desc, avail, used)
        self.driver = DriverRing(
            memory.arena, size=size, desc=desc, avail=avail, used=used, features=features, base=base
        )

    def log_addr(self, *, log: bool) -> VringAddr:
        desc, avail, used = (USER_BASE + place for place in self.places)
        return VringAddr(self.index, VringFlag.LOG if log else 0, desc, used, avail, self.places[2] if log else 0)


class Copy:
    """Guest memory as a migration's destination has it."""

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        self.bytes = bytearray(ram.view[DEVICE:])
        self.pages = 0

    def take(self, log: DirtyLog) -> None:
        """Clear the log, and copy every page that had a bit."""
        for at, bits in enumerate(log.take()):
            for bit in range(8):
                if bits >> bit & 1:
                    self.copy((at * 8 + bit) * PAGE)

    def copy(self, gpa: int) -> None:
        if gpa >= DEVICE:
            self.bytes[gpa - DEVICE : gpa - DEVICE + PAGE] = self.ram.view[gpa : gpa + PAGE]
            self.pages += 1

    def differing(self) -> list[int]:
        """Pages that are not as in guest memory."""
        real = self.ram.view[DEVICE:]
        return [
            DEVICE + at for at in range(0, len(self.bytes), PAGE) if self.bytes[at : at + PAGE] != real[at : at + PAGE]
        ]


def disk_of(kind: str, tmp_path: Path) -> Disk:
    if kind == "memory":
        return MemoryDisk(1 << 20)
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(7).randbytes(1 << 20))
    return FileDisk(str(image), engine=kind.removesuffix("+faults"))


@pytest.fixture(params=["memory", "io_uring", "syscalls", "io_uring+faults"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The socket of a disk with 2 queues, half of whose reads fail for one of the kinds."""
    where = str(tmp_path / "disk.sock")
    with disk_of(request.param, tmp_path) as disk:
        faults = Faults.parse("error-read=0.5,delay-read=1ms") if "faults" in request.param else None
        device = BlockDevice(FaultyDisk(disk, faults) if faults else disk, num_queues=2, serial="logged")
        with Server(device, listen(where)):
            yield where
        device.close()


class Load:
    """Random requests on some rings, answered in any order."""

    def __init__(self, ram: Ram, rings: list[LoggedRing], rng: random.Random) -> None:
        self.ram, self.rings, self.rng = ram, rings, rng
        self.answered = 0
        self.headers = ram.room(16 * SLOTS, 16)
        self.tables = ram.room(256 * SLOTS, 16)
        self.free = list(range(SLOTS))
        self.taken: dict[tuple[int, int], int] = {}

    def make(self, ring: LoggedRing) -> None:
        """One request: most are reads, whose buffers are cut anywhere."""
        if not self.free:
            return
        rng, slot = self.rng, self.free[-1]
        kind = rng.choice((IN, IN, IN, IN, OUT, FLUSH, GET_ID))
        sectors = rng.randint(1, 24)
        header = self.headers + 16 * slot
        sector = rng.randrange(2048) if rng.random() < 0.05 else rng.randrange(2048 - sectors)
        self.ram.view[header : header + 16] = kind.to_bytes(8, "little") + sector.to_bytes(8, "little")
        room = {IN: 512 * sectors, GET_ID: 20}.get(kind, 0)
        writable, left = [], room + 1
        while left:
            piece = left if rng.random() < 0.3 else rng.randint(1, left)
            at = rng.randrange(DEVICE + (1 << 20), self.ram.size - piece)
            writable.append((at, piece))
            left -= piece
            if len(writable) == 6:
                piece = left
                if piece:
                    writable.append((rng.randrange(DEVICE + (1 << 20), self.ram.size - piece), piece))
                left = 0
        readable = [(header, 16)]
        if kind == OUT:
            readable.append((self.headers, 512 * sectors))
        table = self.tables + 256 * slot
        indirect = ring.features & INDIRECT and rng.random() < 0.7
        try:
            head = ring.driver.add(readable, writable, table=(table, table) if indirect else None)
        except BlockingIOError:
            self.reap(ring)
        else:
            self.taken[ring.index, head] = self.free.pop()

    def push(self, ring: LoggedRing) -> None:
        if ring.driver.publish():
            os.eventfd_write(ring.kick, 1)

    def reap(self, ring: LoggedRing) -> None:
        for head, _ in ring.driver.reap():
            self.free.append(self.taken.pop((ring.index, head)))
            self.answered += 1
        if self.rng.random() < 0.3:
            ring.driver.enable_calls()


@contextmanager
def one_ring(served: str) -> Iterator[tuple[Frontend, Ram, LoggedRing, int]]:
    """A connection, its memory, one ring that runs, and the features."""
    ram = Ram()
    with Frontend.connect(served) as peer:
        features = peer.negotiate(1 << 32)
        ram.share(peer)
        ring = LoggedRing(ram, 0, 64, features)
        ring.start(peer)
        yield peer, ram, ring, features
        ring.close()


def begin_log(peer: Frontend, rings: list[LoggedRing], log: DirtyLog, features: int) -> None:
    """As QEMU does."""
    set_log(peer, log)
    peer.do(Req.SET_FEATURES, U64(features | F_PROTOCOL_FEATURES | F_LOG_ALL))
    for ring in rings:
        peer.do(Req.SET_VRING_ADDR, ring.log_addr(log=True))


def set_log(peer: Frontend, log: DirtyLog) -> None:
    assert peer.ask(Req.SET_LOG_BASE, Log(log.size, 0), [log.fd]) == Log(log.size, 0)


@pytest.mark.covers("VHOST_USER_SET_LOG_BASE", "VHOST_USER_SET_VRING_ADDR", "VHOST_USER_PROTOCOL_F_LOG_SHMFD")
@pytest.mark.parametrize(("features", "size"), [(0, 64), (EVENT, 1024), (INDIRECT | EVENT, 512), (INDIRECT, 128)])
def test_a_copy_made_of_logged_pages_is_guest_memory(served: str, features: int, size: int) -> None:
    rng = random.Random(f"{features} {size}")
    ram = Ram()
    with Frontend.connect(served) as peer:
        features = peer.negotiate(features | 1 << 9)
        ram.share(peer)
        rings = [LoggedRing(ram, index, size, features) for index in range(2)]
        for ring in rings:
            ring.start(peer)
        load = Load(ram, rings, rng)
        for ring in rings:  # some are under way when logging begins
            for _ in range(8):
                load.make(ring)
            load.push(ring)
        log = DirtyLog.create(ram.size // PAGE // 8)
        begin_log(peer, rings, log, features)
        copy = Copy(ram)
        turn = 0
        while turn < 150 or load.answered < 400:
            turn += 1
            for ring in rings:
                for _ in range(rng.randrange(12)):
                    load.make(ring)
                load.push(ring)
                load.reap(ring)
            copy.take(log)
            if turn % 40 == 39:  # Cloud Hypervisor swaps in a new one to read the old one
                before, log = log, DirtyLog.create(ram.size // PAGE // 8)
                set_log(peer, log)
                copy.take(before)
                assert not any(before.take()), "nothing goes into the old log once the new one is acknowledged"
        for ring in rings:
            ring.stop(peer)
        copy.take(log)
        assert copy.differing() == []
        assert not any(log.take()), "a stopped device writes nothing"
        assert copy.pages > 300
        for ring in rings:
            ring.close()


def test_used_entries_that_go_on_at_the_ring_s_begin_are_logged_there_too(served: str) -> None:
    """With a ring of 1024 the entries before the wrap, those behind it and the index lie on three pages."""
    ram = Ram()
    with Frontend.connect(served) as peer:
        features = peer.negotiate(1 << 32)
        ram.share(peer)
        ring = LoggedRing(ram, 0, 1024, features, base=1016, parted=True)
        ring.start(peer, base=1016)
        log = DirtyLog.create(ram.size // PAGE // 8)
        begin_log(peer, [ring], log, features)
        log.take()
        ram.view[ram.scratch : ram.scratch + 16] = GET_ID.to_bytes(16, "little")
        for number in range(16):
            place = ram.size - PAGE * (number + 1)
            ring.driver.add([(ram.scratch, 16)], [(place, 21)])
        os.eventfd_write(ring.kick, int(ring.driver.publish()) or 1)
        done = 0
        while done < 16:
            done += len(ring.wait())
        bits, first = log.take(), (ring.places[2] + 4) // PAGE
        assert [bits[page // 8] >> page % 8 & 1 for page in (first - 1, first, first + 1)] == [1, 1, 1]
        ring.close()


def test_once_logging_ends_nothing_is_logged(served: str) -> None:
    with one_ring(served) as (peer, ram, ring, features):
        log = DirtyLog.create(ram.size // PAGE // 8)
        begin_log(peer, [ring], log, features)
        ring.request(GET_ID, 0, room=20)
        # Cloud Hypervisor ends with the ring, QEMU with the features.
        peer.do(Req.SET_VRING_ADDR, ring.log_addr(log=False))
        peer.do(Req.SET_FEATURES, U64(features | F_PROTOCOL_FEATURES))
        used = ring.places[2]
        bits = log.take()
        assert bits[ram.scratch // PAGE // 8]
        assert bits[used // PAGE // 8]
        ring.request(GET_ID, 0, room=20)
        ring.stop(peer)
        assert not any(log.take())


def test_data_is_logged_by_one_feature_and_the_used_ring_by_another(served: str) -> None:
    with one_ring(served) as (peer, ram, ring, features):
        log = DirtyLog.create(ram.size // PAGE // 8)
        set_log(peer, log)
        ring.request(GET_ID, 0, room=20)
        assert not any(log.take())
        peer.do(Req.SET_VRING_ADDR, ring.log_addr(log=True))
        log.take()
        ring.request(GET_ID, 0, room=20)
        bits = log.take()
        assert sum(byte.bit_count() for byte in bits) == 1
        assert bits[ring.places[2] // PAGE // 8]
        peer.do(Req.SET_VRING_ADDR, ring.log_addr(log=False))
        log.take()  # the worker asked for kicks meanwhile
        peer.do(Req.SET_FEATURES, U64(features | F_PROTOCOL_FEATURES | F_LOG_ALL))
        ring.request(GET_ID, 0, room=20)
        bits = log.take()
        assert sum(byte.bit_count() for byte in bits) == 1
        assert bits[ram.scratch // PAGE // 8]


def test_what_the_log_has_no_bit_for_is_not_written(served: str) -> None:
    """The request is answered with an error where its status byte can be logged, and with length 0 where not."""
    with one_ring(served) as (peer, ram, ring, features):
        end = ram.size - (1 << 20)
        log = DirtyLog.create(end // PAGE // 8)
        begin_log(peer, [ring], log, features)
        header, status = ram.scratch, DEVICE + (1 << 20)
        ram.view[header : header + 16] = bytes(16)
        ram.view[end : end + 512] = ram.view[status : status + 512] = b"\xee" * 512
        ring.submit([(header, 16)], [(end, 512), (status, 1)])
        ((_, written),) = ring.wait()
        assert (written, ram.view[status]) == (0, 1)
        ring.submit([(header, 16)], [(status, 512), (end, 1)])
        ((_, written),) = ring.wait()
        assert written == 0
        assert bytes(ram.view[end : end + 512]) == b"\xee" * 512
        assert bytes(ram.view[status + 1 : status + 512]) == b"\xee" * 511


def test_a_used_ring_that_the_log_has_no_bits_for_is_refused(served: str) -> None:
    with one_ring(served) as (peer, ram, ring, _):
        set_log(peer, DirtyLog.create(DEVICE // PAGE // 8))
        assert peer.tell(Req.SET_VRING_ADDR, ring.log_addr(log=True)) != 0
        assert ring.request(GET_ID, 0, room=20)[0] == 0
        set_log(peer, DirtyLog.create(ram.size // PAGE // 8))
        peer.do(Req.SET_VRING_ADDR, ring.log_addr(log=True))


def test_a_ring_that_goes_on_from_a_region_has_all_of_its_used_ring_logged(served: str) -> None:
    """Its predecessor may have died between writing it and logging it."""
    ram = Ram()
    with Frontend.connect(served) as peer:
        features = peer.negotiate(1 << 32)
        ram.share(peer)
        region_fd = peer.ask(Req.GET_INFLIGHT_FD, Inflight(0, 0, 2, 1024))
        assert isinstance(region_fd, Inflight)
        (fd,) = peer.fds
        with fd:
            peer.do(Req.SET_INFLIGHT_FD, region_fd, [fd.fileno()])
        log = DirtyLog.create(ram.size // PAGE // 8)
        set_log(peer, log)
        ring = LoggedRing(ram, 0, 1024, features)
        ring.start(peer)
        peer.do(Req.SET_VRING_ADDR, ring.log_addr(log=True))
        first, last = ring.places[2] // PAGE, (ring.places[2] + 6 + 8 * 1024 - 1) // PAGE
        bits = log.take()
        assert [page for page in range(len(bits) * 8) if bits[page // 8] >> page % 8 & 1] == list(
            range(first, last + 1)
        )
        ring.close()


def test_a_log_that_is_truncated_ends_the_connection_and_not_the_back_end(served: str) -> None:
    ram = Ram()
    file = os.memfd_create("log")
    with os.fdopen(file), Frontend.connect(served) as peer:
        os.ftruncate(file, 4096)
        features = peer.negotiate(1 << 32)
        ram.share(peer)
        ring = LoggedRing(ram, 0, 64, features)
        ring.start(peer)
        assert peer.ask(Req.SET_LOG_BASE, Log(4096, 0), [file]) == Log(4096, 0)
        os.ftruncate(file, 0)
        try:
            peer.do(Req.SET_VRING_ADDR, ring.log_addr(log=True))
            peer.send(Req.SET_FEATURES, U64(features | F_PROTOCOL_FEATURES | F_LOG_ALL))
            ring.submit([(ram.scratch, 16)], [(DEVICE, 1)])
            assert peer.closed_by_peer()
        except (GoneError, OSError):
            pass
        ring.close()
    with Frontend.connect(served) as peer:
        peer.negotiate()


def test_a_log_in_a_descriptor_that_is_none_ends_the_connection(served: str) -> None:
    """The reply has no form for a failure."""
    with Frontend.connect(served) as peer:
        peer.negotiate(protocol=ProtocolFeature.LOG_SHMFD)
        read, write = os.pipe()
        with os.fdopen(read), os.fdopen(write):
            peer.send(Req.SET_LOG_BASE, Log(4096, 0), [read])
            assert peer.closed_by_peer()


@pytest.mark.covers("VHOST_USER_SET_LOG_FD")
def test_a_descriptor_is_signalled_when_something_was_logged(served: str) -> None:
    with one_ring(served) as (peer, ram, ring, features):
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        peer.do(Req.SET_LOG_FD, fds=[fd])
        ring.request(GET_ID, 0, room=20)
        begin_log(peer, [ring], DirtyLog.create(ram.size // PAGE // 8), features)
        ring.request(GET_ID, 0, room=20)
        assert select.select([fd], [], [], WAIT_S)[0]
        with open(os.devnull) as useless:
            assert peer.tell(Req.SET_LOG_FD, fds=[useless.fileno()]) != 0
        os.close(fd)
