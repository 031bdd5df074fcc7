"""Every feature and request of a block device that the conformance table claims, as a driver sees it over a socket."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.backend.frontend import INDIRECT_EVENT_V1, WAIT_S, Frontend, GuestRam, GuestRing

from vhostuser import BlkFeature, BlockDevice, RingFeature, Server, listen, open_disk
from vhostuser.protocol import Config, FrontendRequest
from vhostuser.virtio.blk import VirtioBlkConfig
from vhostuser.virtio.blk_requests import BlkRequestType, BlkStatus, DiscardWriteZeroes, SegmentFlag

MIB = 1 << 20
SECTOR = 512
Type = BlkRequestType


class Guest:
    """A driver with one ring on a disk served by a server of its own; ended by `close`."""

    def __init__(self, place: str, features: int | None = None, size: int = 64) -> None:
        """Connect and accept ``features``, all that are offered by default."""
        self.peer = Frontend.connect(place)
        self.features = self.peer.negotiate(features)
        self.ram = GuestRam()
        self.ram.share(self.peer)
        self.ring = GuestRing(self.ram, 0, size, self.features)
        self.ring.start(self.peer)
        self._closed = False

    def request(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> tuple[BlkStatus, bytes]:
        """One request and its answer."""
        status, read = self.ring.request(kind, sector, data, room)
        return BlkStatus(status), read

    def config(self) -> VirtioBlkConfig:
        """The configuration space."""
        return VirtioBlkConfig.unpack(self.peer.config(60))

    def close(self) -> None:
        """Disconnect. Idempotent."""
        if not self._closed:
            self._closed = True
            self.peer.close()
            self.ring.close()


class Machine:
    """Serves disks to guests, all of them ended with the test."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.image = directory / "disk.img"
        self.image.write_bytes(bytes(range(1, 129)) * (4 * MIB // 128))
        self._place = str(directory / "disk.sock")
        self._stack = stack

    def serve(self, *, read_only: bool = False, **options: int | str) -> None:
        """Serve the image with options of `BlockDevice`."""
        disk = self._stack.enter_context(open_disk(str(self.image), read_only=read_only))
        device = BlockDevice(disk, **options)  # type: ignore[arg-type]
        self._stack.callback(device.close)
        self._stack.enter_context(Server(device, listen(self._place)))

    def guest(self, features: int | None = None, size: int = 64) -> Guest:
        """Connect a driver."""
        guest = Guest(self._place, features, size)
        self._stack.callback(guest.close)
        return guest


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(tmp_path, stack)


def segment(sector: int, num_sectors: int, flags: int = 0) -> bytes:
    return DiscardWriteZeroes(sector, num_sectors, flags).pack()


@pytest.mark.covers("VIRTIO_BLK_T_IN", "VIRTIO_BLK_T_OUT")
def test_what_is_written_is_read_and_lies_in_the_image(machine: Machine) -> None:
    machine.serve()
    guest = machine.guest()
    data = os.urandom(8 * SECTOR)
    assert guest.request(Type.OUT, 40, data) == (BlkStatus.OK, b"")
    assert guest.request(Type.IN, 40, room=8 * SECTOR) == (BlkStatus.OK, data)
    assert guest.request(Type.IN, 4 * MIB // SECTOR, room=SECTOR)[0] == BlkStatus.IOERR
    assert guest.request(Type.FLUSH)[0] == BlkStatus.OK
    assert machine.image.read_bytes()[40 * SECTOR : 48 * SECTOR] == data


@pytest.mark.covers("VIRTIO_BLK_F_FLUSH", "VIRTIO_BLK_T_FLUSH")
def test_a_flush_is_offered_and_answered(machine: Machine) -> None:
    machine.serve()
    guest = machine.guest()
    assert guest.features & BlkFeature.FLUSH
    assert guest.request(Type.FLUSH) == (BlkStatus.OK, b"")


@pytest.mark.covers("VIRTIO_BLK_T_FLUSH_OUT", "VIRTIO_F_VERSION_1")
def test_a_driver_without_version_1_is_served_and_its_flush_has_two_numbers(machine: Machine) -> None:
    machine.serve()
    old = machine.guest(features=int(BlkFeature.FLUSH))
    assert old.request(Type.FLUSH_OUT) == (BlkStatus.OK, b"")
    assert old.request(Type.IN, 0, room=SECTOR)[0] == BlkStatus.OK
    old.close()
    new = machine.guest()
    assert new.features & RingFeature.VERSION_1
    assert new.request(Type.FLUSH_OUT)[0] == BlkStatus.UNSUPP


@pytest.mark.covers("VIRTIO_BLK_T_GET_ID")
def test_the_serial_is_told(machine: Machine) -> None:
    machine.serve(serial="S-42")
    assert machine.guest().request(Type.GET_ID, room=20) == (BlkStatus.OK, b"S-42".ljust(20, b"\0"))


@pytest.mark.covers("VIRTIO_BLK_F_DISCARD", "VIRTIO_BLK_T_DISCARD")
def test_a_discard_gives_the_space_back(machine: Machine) -> None:
    machine.serve()
    guest = machine.guest()
    config = guest.config()
    assert guest.features & BlkFeature.DISCARD
    assert config.max_discard_sectors > 0
    assert config.max_discard_seg > 1
    before = machine.image.stat().st_blocks
    pieces = segment(0, MIB // SECTOR) + segment(2 * MIB // SECTOR, MIB // SECTOR)
    assert guest.request(Type.DISCARD, data=pieces) == (BlkStatus.OK, b"")
    assert machine.image.stat().st_blocks <= before - 2 * MIB // SECTOR
    too_many = b"".join(segment(0, 8) for _ in range(config.max_discard_seg + 1))
    assert guest.request(Type.DISCARD, data=too_many)[0] != BlkStatus.OK


@pytest.mark.covers("VIRTIO_BLK_F_WRITE_ZEROES", "VIRTIO_BLK_T_WRITE_ZEROES")
@pytest.mark.parametrize("flags", [0, SegmentFlag.UNMAP])
def test_zeroes_are_written_with_and_without_unmap(machine: Machine, flags: int) -> None:
    machine.serve()
    guest = machine.guest()
    assert guest.features & BlkFeature.WRITE_ZEROES
    assert guest.config().write_zeroes_may_unmap == 1
    assert guest.request(Type.WRITE_ZEROES, data=segment(3, 5, flags)) == (BlkStatus.OK, b"")
    content = machine.image.read_bytes()
    assert content[3 * SECTOR : 8 * SECTOR] == bytes(5 * SECTOR)
    assert content[2 * SECTOR : 3 * SECTOR] == content[8 * SECTOR : 9 * SECTOR] == bytes(range(1, 129)) * 4


UNSUPPORTED = [
    kind for kind in Type if kind.name.startswith(("SCSI", "ZONE")) or kind in (Type.GET_LIFETIME, Type.SECURE_ERASE)
]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.covers(f"VIRTIO_BLK_T_{kind.name}"), id=kind.name) for kind in UNSUPPORTED],
)
def test_a_request_that_is_not_offered_is_answered_so_and_the_ring_goes_on(machine: Machine, kind: int) -> None:
    machine.serve()
    guest = machine.guest()
    assert guest.request(kind, room=64)[0] == BlkStatus.UNSUPP
    assert guest.request(kind, data=segment(0, 8))[0] == BlkStatus.UNSUPP
    assert guest.request(Type.IN, room=SECTOR) == (BlkStatus.OK, bytes(range(1, 129)) * 4)


@pytest.mark.covers("VIRTIO_BLK_F_RO")
def test_a_read_only_disk_says_so_and_refuses_what_writes(machine: Machine) -> None:
    machine.serve(read_only=True)
    guest = machine.guest()
    assert guest.features & BlkFeature.RO
    assert not guest.features & (BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)
    before = machine.image.read_bytes()
    assert guest.request(Type.OUT, 0, bytes(SECTOR))[0] == BlkStatus.IOERR
    for kind in (Type.DISCARD, Type.WRITE_ZEROES):
        assert guest.request(kind, data=segment(0, 8))[0] in (BlkStatus.IOERR, BlkStatus.UNSUPP)
    assert guest.request(Type.IN, 0, room=SECTOR) == (BlkStatus.OK, before[:SECTOR])
    assert machine.image.read_bytes() == before


@pytest.mark.covers(
    "VIRTIO_BLK_F_SEG_MAX", "VIRTIO_BLK_F_SIZE_MAX", "VIRTIO_BLK_F_BLK_SIZE", "VIRTIO_BLK_F_TOPOLOGY", "VIRTIO_BLK_F_MQ"
)
def test_the_shape_of_the_disk_is_in_its_configuration(machine: Machine) -> None:
    machine.serve(num_queues=3, seg_max=62, size_max=65536, block_size=1024, physical_block_size=8192)
    guest = machine.guest()
    for feature in (BlkFeature.SEG_MAX, BlkFeature.SIZE_MAX, BlkFeature.BLK_SIZE, BlkFeature.TOPOLOGY, BlkFeature.MQ):
        assert guest.features & feature
    config = guest.config()
    assert (config.capacity, config.seg_max, config.size_max) == (4 * MIB // SECTOR, 62, 65536)
    assert (config.blk_size, config.physical_block_exp, config.num_queues) == (1024, 3, 3)
    assert guest.request(Type.IN, 1, room=1024)[0] == BlkStatus.IOERR, "half a block off"
    second = GuestRing(guest.ram, 2, 16, guest.features)
    second.start(guest.peer)
    assert second.request(Type.IN, 0, room=1024)[0] == BlkStatus.OK
    second.close()


@pytest.mark.covers("VIRTIO_BLK_F_CONFIG_WCE")
@pytest.mark.parametrize("flags", [0, 1, 2])
def test_the_driver_switches_its_write_cache(machine: Machine, flags: int) -> None:
    machine.serve()
    guest = machine.guest()
    assert guest.features & BlkFeature.CONFIG_WCE
    assert guest.config().writeback == 1
    for wanted in (0, 1):
        guest.peer.do(FrontendRequest.SET_CONFIG, Config(32, 1, flags, bytes([wanted])))
        assert guest.config().writeback == wanted
        assert guest.request(Type.OUT, 0, bytes(SECTOR))[0] == BlkStatus.OK


@pytest.mark.covers("VIRTIO_F_INDIRECT_DESC")
def test_a_request_in_an_indirect_table_is_served(machine: Machine) -> None:
    machine.serve()
    guest = machine.guest(INDIRECT_EVENT_V1, size=1)
    view = memoryview(guest.ram.arena)
    base, table = guest.ram.scratch, guest.ram.scratch + 8192
    view[base : base + 16] = bytes(16)
    readable = [(base, 4), (base + 4, 12)]
    writable = [(base + 1024, 100), (base + 2048, 412), (base + 4096, 1)]
    guest.ring.driver.add(readable, writable, table=(table, table))
    if guest.ring.driver.publish():
        os.eventfd_write(guest.ring.kick, 1)
    assert [written for _, written in guest.ring.wait()] == [513]
    assert view[base + 4096] == BlkStatus.OK
    assert bytes(view[base + 1024 : base + 1124]) + bytes(view[base + 2048 : base + 2460]) == bytes(range(1, 129)) * 4


@pytest.mark.covers("VIRTIO_F_EVENT_IDX")
def test_the_driver_is_called_when_as_much_is_done_as_it_asked_for(machine: Machine) -> None:
    machine.serve()
    guest = machine.guest(INDIRECT_EVENT_V1)
    ring, base = guest.ring, guest.ram.scratch
    memoryview(guest.ram.arena)[base : base + 16] = bytes(16)
    ring.submit([(base, 16)], [(base + 1024, 513)])
    assert select.select([ring.call], [], [], WAIT_S)[0]  # the first answer on a ring calls in any case
    os.eventfd_read(ring.call)
    assert len(ring.driver.reap()) == 1
    assert not ring.driver.enable_calls(after=3)
    done = 0
    for number in range(3):
        ring.submit([(base, 16)], [(base + 1024, 513)])
        if number < 2:
            while not ring.driver.reap():
                assert not select.select([ring.call], [], [], 0)[0], "called before it was asked for"
            done += 1
    assert select.select([ring.call], [], [], WAIT_S)[0]
    assert done + len(ring.driver.reap()) == 3
