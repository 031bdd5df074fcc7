"""A whole back-end in one process: server, session, native queues and storage, driven through real rings."""

from __future__ import annotations

import gc
import logging
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.backend.frontend import INDIRECT_EVENT_V1, WAIT_S, Frontend, GoneError, GuestRam, GuestRing

from vhostuser._native import GuestMemory
from vhostuser.backend import Server
from vhostuser.blk import BlockDevice
from vhostuser.disks import FileDisk, MemoryDisk
from vhostuser.protocol import FrontendRequest, MemoryRegion, MemoryTable, SingleRegion, VringState
from vhostuser.transport import listen

Req = FrontendRequest
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """The socket of a server with a memory disk of 1 MiB and 4 queues on 2 workers."""
    where = str(tmp_path / "disk.sock")
    with MemoryDisk(1 << 20) as disk:
        device = BlockDevice(disk, num_queues=4, num_workers=2, serial="from the test")
        with Server(device, listen(where)):
            yield where
        device.close()


def test_requests_on_all_queues_are_served(path: str) -> None:
    with Frontend.connect(path) as peer:
        features = peer.negotiate()
        ram = GuestRam()
        ram.share(peer)
        rings = [GuestRing(ram, index, 64, features) for index in range(4)]
        for ring in rings:
            ring.start(peer)
        for ring in rings:
            assert ring.request(OUT, ring.index, bytes([ring.index + 1]) * 512) == (OK, b"")
        for ring in rings:
            status, data = ring.request(IN, 0, room=2048)
            assert status == OK
            assert data == b"".join(bytes([number + 1]) * 512 for number in range(4))
        assert rings[0].request(GET_ID, 0, room=20) == (OK, b"from the test".ljust(20, b"\0"))
        assert rings[0].request(FLUSH, 0) == (OK, b"")
        assert rings[0].request(IN, 2048, room=512)[0] == IOERR
        assert rings[0].request(99, 0)[0] == UNSUPP
        for ring in rings:
            ring.close()


@pytest.mark.parametrize("features", [0, 1 << 32, 1 << 28 | 1 << 32, 1 << 29 | 1 << 32, INDIRECT_EVENT_V1])
def test_drivers_of_every_kind_are_served(path: str, features: int) -> None:
    with Frontend.connect(path) as peer:
        peer.negotiate(features)
        ram = GuestRam()
        ram.share(peer)
        ring = GuestRing(ram, 0, 2, features)
        ring.start(peer)
        for sector in range(10):
            assert ring.request(OUT, sector, bytes([sector]) * 512)[0] == OK
            assert ring.request(IN, sector, room=512) == (OK, bytes([sector]) * 512)
        ring.close()


def test_a_ring_goes_on_where_it_stopped(path: str) -> None:
    with Frontend.connect(path) as peer:
        features = peer.negotiate()
        ram = GuestRam()
        ram.add(peer)
        ring = GuestRing(ram, 0, 16, features)
        base = 0
        for _ in range(5):
            ring.start(peer, base=base)
            for _ in range(7):
                assert ring.request(OUT, 0, bytes(512))[0] == OK
            base = ring.stop(peer)
        assert base == 35
        assert ring.stop(peer) == 35
        ring.close()


def test_firmware_and_kernel_drive_the_same_connection_one_after_the_other(path: str) -> None:
    """SeaBIOS drives ring 0 only, with other features, and the kernel comes after a whole new set-up."""
    with Frontend.connect(path) as peer:
        peer.negotiate(1 << 32)
        ram = GuestRam()
        ram.share(peer)
        ring = GuestRing(ram, 0, 128, 1 << 32)
        ring.start(peer, enable=False)
        for index in range(4):
            peer.do(Req.SET_VRING_ENABLE, VringState(index, 1))
        assert ring.request(OUT, 3, b"boot" * 128)[0] == OK
        for index in range(4):
            peer.do(Req.SET_VRING_ENABLE, VringState(index, 0))
        ring.stop(peer)
        ring.close()
        peer.do(Req.RESET_DEVICE)
        features = peer.negotiate()
        ram = GuestRam()
        ram.share(peer)
        rings = [GuestRing(ram, index, 32, features) for index in range(4)]
        for again in rings:
            again.start(peer)
            assert again.request(IN, 3, room=512) == (OK, b"boot" * 128)
            again.close()


def test_a_region_may_come_and_go_between_requests(path: str) -> None:
    with Frontend.connect(path) as peer:
        features = peer.negotiate()
        ram, other = GuestRam(), GuestRam()
        ram.add(peer)
        ring = GuestRing(ram, 0, 64, features)
        ring.start(peer)
        far = MemoryRegion(1 << 32, other.size, 1 << 44, 0)
        for _ in range(20):
            peer.do(Req.ADD_MEM_REG, SingleRegion(far), [other.arena.fd])
            assert ring.request(OUT, 1, b"x" * 512)[0] == OK
            peer.do(Req.REM_MEM_REG, SingleRegion(far), [])
            assert ring.request(IN, 1, room=512) == (OK, b"x" * 512)
        ring.close()


def test_a_bad_chain_breaks_its_ring_and_signals_it_and_nothing_else(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Frontend.connect(path) as peer:
        features = peer.negotiate()
        ram = GuestRam()
        ram.share(peer)
        bad, good = (GuestRing(ram, index, 64, features) for index in (0, 1))
        bad.start(peer)
        good.start(peer)
        memoryview(ram.arena)[bad.places[1] + 2 : bad.places[1] + 4] = b"\xff\x7f"  # an index that jumped
        os.eventfd_write(bad.kick, 1)
        assert select.select([bad.err], [], [], WAIT_S)[0], "the front-end was not told"
        assert good.request(OUT, 0, bytes(512))[0] == OK
        peer.barrier()
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(lines) == 1
        assert "ring 0 is broken" in lines[0]
        assert isinstance(bad.stop(peer), int)
        bad.close()
        good.close()


def test_memory_that_is_truncated_ends_its_connection_and_the_server_goes_on(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 20)
    with Frontend.connect(path) as peer:
        features = peer.negotiate()
        peer.do(Req.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 1 << 20, 0x7F00_0000_0000, 0),)), [fd])
        ring = GuestRing(GuestRam(), 0, 64, features)
        ring.start(peer)
        os.ftruncate(fd, 0)
        os.eventfd_write(ring.kick, 1)
        with pytest.raises(GoneError):
            peer.receive()
        ring.close()
    os.close(fd)
    assert "guest memory was lost" in caplog.text
    with Frontend.connect(path) as peer:
        peer.negotiate()


def test_a_front_end_that_vanishes_under_load_leaves_a_disk_that_serves_the_next_one(path: str) -> None:
    for _ in range(5):
        with Frontend.connect(path) as peer:
            features = peer.negotiate()
            ram = GuestRam()
            ram.share(peer)
            ring = GuestRing(ram, 0, 64, features)
            ring.start(peer)
            view = memoryview(ram.arena)
            view[ram.scratch : ram.scratch + 16] = bytes(16)
            for _ in range(20):
                ring.submit([(ram.scratch, 16)], [(ram.scratch + 4096, 4097)])
        ring.close()
    with Frontend.connect(path) as peer:
        peer.negotiate()


def test_a_hundred_connections_leave_no_descriptor_thread_or_mapping(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    where = str(tmp_path / "disk.sock")

    def once() -> None:
        with Frontend.connect(where) as peer:
            features = peer.negotiate()
            ram = GuestRam(2 << 20)
            ram.share(peer)
            ring = GuestRing(ram, 0, 64, features)
            ring.start(peer)
            assert ring.request(IN, 0, room=4096)[0] == OK
            ring.close()

    def census() -> tuple[int, int, int]:
        gc.collect()
        maps = sum("memfd" in line for line in Path("/proc/self/maps").read_text().splitlines())
        return len(os.listdir("/proc/self/fd")), threading.active_count(), maps

    with FileDisk(image) as disk:
        device = BlockDevice(disk, num_queues=2)
        with Server(device, listen(where)) as server:
            once()
            settled(server)
            before = census()
            for _ in range(100):
                once()
            settled(server)
            assert census() == before
        device.close()


def settled(server: Server) -> None:
    """Wait until the last session is over."""
    while server.connected or any(thread.name.startswith("session") for thread in threading.enumerate()):
        os.sched_yield()


def test_guest_memory_is_shared_both_ways(path: str) -> None:
    ram = GuestRam()
    memory = GuestMemory([(0, ram.size, 0x7F00_0000_0000, 0, ram.arena.fd)])
    memory.write(100, b"written through the table")
    assert bytes(memoryview(ram.arena)[100:125]) == b"written through the table"
