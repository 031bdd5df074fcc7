"""The virtio disk: what it offers, its write cache, its size, and what it tells."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.backend.frontend import WAIT_S, Frontend, GuestRam, GuestRing

from vhostuser.backend import ConfigNotice, Device
from vhostuser.blk import BlockDevice
from vhostuser.disks import Capability, Disk, FileDisk, Limits, MemoryDisk, NativeDisk, NullDisk
from vhostuser.errors import ConfigRefused, OperatorError, UsageError
from vhostuser.protocol import Config, FrontendRequest, VringState
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig
from vhostuser.virtio.features import RingFeature

Req = FrontendRequest
IN, OUT, FLUSH, DISCARD, ZEROES = 0, 1, 4, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
WCE = BlkFeature.CONFIG_WCE | BlkFeature.FLUSH

Make = Callable[..., BlockDevice]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make a device over a disk of 1 MiB, or over the one given; both are closed at the end."""
    made: list[BlockDevice] = []

    def device(disk: Disk | None = None, **options: object) -> BlockDevice:
        made.append(BlockDevice(disk or MemoryDisk(1 << 20), **options))  # type: ignore[arg-type]
        return made[-1]

    yield device
    for one in made:
        one.close()
        one.disk.close()


def config_of(device: Device) -> VirtioBlkConfig:
    return VirtioBlkConfig.unpack(device.read_config(0, 96))


def test_features_are_those_of_the_disk(make: Make) -> None:
    features = make().features
    for bit in (BlkFeature.SEG_MAX, BlkFeature.BLK_SIZE, BlkFeature.TOPOLOGY, BlkFeature.MQ, WCE, BlkFeature.DISCARD):
        assert features & bit == bit
    for ring_bit in (RingFeature.VERSION_1, RingFeature.INDIRECT_DESC, RingFeature.EVENT_IDX):
        assert features & ring_bit
    for absent in (BlkFeature.SIZE_MAX, BlkFeature.RO, BlkFeature.GEOMETRY, BlkFeature.LIFETIME, BlkFeature.ZONED):
        assert not features & absent
    for absent_ring_bit in (RingFeature.RING_RESET, RingFeature.RING_PACKED, RingFeature.IN_ORDER):
        assert not features & absent_ring_bit


def test_a_read_only_disk_offers_ro_and_nothing_that_writes(make: Make) -> None:
    device = make(MemoryDisk(1 << 20, read_only=True))
    assert device.read_only
    assert device.features & BlkFeature.RO
    assert not device.features & (BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)
    config = config_of(device)
    assert config.max_discard_sectors == config.max_write_zeroes_sectors == 0


def test_the_configuration_says_what_was_asked_for(make: Make) -> None:
    device = make(
        MemoryDisk(1 << 20), num_queues=3, block_size=1024, physical_block_size=4096, seg_max=30, size_max=65536
    )
    config = config_of(device)
    assert device.features & BlkFeature.SIZE_MAX
    assert (config.capacity, config.blk_size, config.physical_block_exp) == (2048, 1024, 2)
    assert (config.seg_max, config.size_max, config.num_queues) == (30, 65536, 3)
    assert (config.min_io_size, config.opt_io_size, config.alignment_offset) == (4, 0, 0)
    assert config.discard_sector_alignment == 8
    assert config.max_discard_seg == config.max_write_zeroes_seg == 16
    assert config.writeback == 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_queues": 0},
        {"num_queues": 257},
        {"num_queues": 2, "num_workers": 3},
        {"num_workers": -1},
        {"serial": "x" * 21},
        {"serial": "müll"},
        {"serial": "a\nb"},
        {"block_size": 511},
        {"block_size": 768},
        {"block_size": 1 << 17},
        {"block_size": 4096, "physical_block_size": 512},
        {"seg_max": 0},
        {"seg_max": 1 << 16},
        {"size_max": 100},
        {"poll_us": -1},
    ],
)
def test_numbers_that_make_no_sense_are_usage_errors(options: dict[str, object]) -> None:
    with MemoryDisk(1 << 20) as disk, pytest.raises(UsageError):
        BlockDevice(disk, **options)  # type: ignore[arg-type]


class Large(NativeDisk):
    """Storage that takes blocks of 4096 bytes only."""

    name = "large"

    def __init__(self) -> None:
        self._below = NullDisk(1 << 20)

    @property
    def limits(self) -> Limits:
        return Limits(1 << 20, block_size=4096)

    def engine(self):  # type: ignore[no-untyped-def]
        return self._below.engine()


def test_a_block_size_below_what_storage_takes_is_refused_with_the_reason(make: Make) -> None:
    assert make(Large()).block_size == 4096
    with pytest.raises(OperatorError, match="whole blocks of 4096"):
        BlockDevice(Large(), block_size=512)


def test_a_disk_without_an_engine_is_refused() -> None:
    class Own(Disk):
        name = "own"
        limits = Limits(512)

        def read(self, offset: int, into: memoryview) -> None:
            into[:] = bytes(len(into))

    with pytest.raises(OperatorError, match="no native engine"):
        BlockDevice(Own())


def test_a_tail_that_fills_no_block_is_not_served_and_said_once(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tmp_path / "odd.img"
    image.write_bytes(bytes(10_000))
    device = make(FileDisk(image), block_size=4096)
    assert device.size == 8192
    assert config_of(device).capacity == 16
    assert caplog.text.count("the last 1808 bytes do not fill a block of 4096") == 1


def test_a_disk_smaller_than_a_block_is_refused(tmp_path: Path) -> None:
    for size in (0, 511):
        image = tmp_path / "small.img"
        image.write_bytes(bytes(size))
        with FileDisk(image) as disk, pytest.raises(UsageError, match="less than one block"):
            BlockDevice(disk)


CACHE_MODES = [
    pytest.param(WCE, True, id="both: as the byte says"),
    pytest.param(BlkFeature.FLUSH, True, id="flush only: write-back"),
    pytest.param(0, False, id="neither: write-through"),
    pytest.param(BlkFeature.CONFIG_WCE, False, id="no flush: write-through"),
]


@pytest.mark.parametrize(("features", "writeback"), CACHE_MODES)
def test_the_write_cache_follows_from_what_was_negotiated(make: Make, features: int, writeback: bool) -> None:
    device = make()
    assert device.writeback
    device.features_acked(features)
    assert device.writeback is writeback
    assert config_of(device).writeback == writeback


@pytest.mark.parametrize(("features", "_writeback"), CACHE_MODES)
def test_a_disk_that_begins_write_through_stays_so(make: Make, features: int, _writeback: bool) -> None:
    disk = MemoryDisk(1 << 20)
    disk.writeback = False
    device = make(disk)
    device.features_acked(features)
    assert not device.writeback
    assert config_of(device).writeback == 0


@pytest.mark.parametrize("flags", [0, 1, 2])
def test_the_guest_switches_its_write_cache_with_byte_32_whatever_the_flags(make: Make, flags: int) -> None:
    device = make()
    device.features_acked(WCE)
    for value in (0, 1, 1, 0):
        device.write_config(32, bytes([value]), flags)
        assert device.writeback is bool(value)
        assert device.read_config(32, 1) == bytes([value])


@pytest.mark.parametrize(
    ("offset", "data"),
    [(32, b"\2"), (32, b"\xff"), (32, b""), (32, b"\1\0"), (31, b"\1"), (33, b"\1"), (0, bytes(8)), (0, bytes(60))],
)
def test_anything_else_is_refused(make: Make, offset: int, data: bytes) -> None:
    device = make()
    device.features_acked(WCE)
    before = device.read_config(0, 96)
    with pytest.raises(ConfigRefused):
        device.write_config(offset, data, 0)
    assert device.read_config(0, 96) == before


def test_the_write_cache_is_not_switched_without_its_feature(make: Make) -> None:
    device = make()
    device.features_acked(BlkFeature.FLUSH)
    with pytest.raises(ConfigRefused, match="CONFIG_WCE"):
        device.write_config(32, b"\0", 0)
    device.reset()
    device.write_config(32, b"\0", 0)  # a legacy driver does it before its features are known


def test_features_sent_again_leave_the_guests_choice(make: Make) -> None:
    device = make()
    device.features_acked(WCE)
    device.write_config(32, b"\0", 0)
    device.features_acked(WCE)
    assert not device.writeback


def test_a_cache_that_was_switched_off_stays_off_over_a_reset(make: Make) -> None:
    device = make()
    device.features_acked(WCE)
    device.write_config(32, b"\0", 0)
    device.reset()
    device.features_acked(WCE)
    assert not device.writeback


class Flushes(MemoryDisk):
    """Counts flushes, and fails them when it is told to."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.flushed = 0
        self.error: OSError | None = None

    def flush(self) -> None:
        self.flushed += 1
        if self.error is not None:
            raise self.error


def test_switching_the_cache_off_flushes_it_once(make: Make) -> None:
    disk = Flushes()
    device = make(disk)
    device.features_acked(WCE)
    assert disk.flushed == 0
    device.write_config(32, b"\0", 0)
    device.write_config(32, b"\0", 0)
    assert disk.flushed == 1


def test_a_cache_that_cannot_be_flushed_stays_on_and_says_so(make: Make) -> None:
    disk = Flushes()
    device = make(disk)
    device.features_acked(WCE)
    disk.error = OSError(5, "Input/output error")
    with pytest.raises(ConfigRefused, match="Input/output error"):
        device.write_config(32, b"\0", 0)
    assert device.writeback
    assert device.read_config(32, 1) == b"\1"


def test_a_disk_is_resized_both_ways_and_storage_follows(make: Make, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    device = make(FileDisk(image))
    for size in (2 << 20, 1 << 19):
        assert device.resize(size) is ConfigNotice.NOT_CONNECTED
        assert device.size == image.stat().st_size == size
        assert config_of(device).capacity == size // 512
    os.truncate(image, 3 << 20)
    assert device.refresh() is ConfigNotice.NOT_CONNECTED
    assert device.size == 3 << 20
    assert device.refresh() is None
    with pytest.raises(UsageError):
        device.resize(0)
    assert device.size == 3 << 20


def test_storage_that_refuses_a_resize_leaves_the_disk_as_it_was(make: Make) -> None:
    class Stiff(MemoryDisk):
        def resize(self, size: int) -> None:
            raise OSError(28, "No space left on device")

    device = make(Stiff(1 << 20))
    for size in (1 << 19, 1 << 21):
        with pytest.raises(OSError, match="No space"):
            device.resize(size)
        assert device.size == 1 << 20
        assert config_of(device).capacity == 2048


def test_a_disk_that_cannot_be_resized_says_why(make: Make, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    device = make(FileDisk(image, read_only=True))
    assert Capability.RESIZE not in device.disk.capabilities
    with pytest.raises(UsageError, match="read-only"):
        device.resize(1 << 21)
    assert image.stat().st_size == 1 << 20


def test_info_and_statistics_are_plain_data(make: Make) -> None:
    device = make(num_queues=2, serial="abc")
    info = device.info()
    assert info["size"] == 1 << 20
    assert info["num_queues"] == 2
    assert info["connected"] is False
    assert info["features_acked"] is None
    assert len(device.statistics()) == 2


@pytest.fixture
def guest(make: Make, serve: Callable[[Device], Frontend], tmp_path: Path) -> tuple[BlockDevice, Frontend, GuestRing]:
    """A device over a file of 1 MiB, a front-end, and its ring, which runs."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    device = make(FileDisk(image), num_queues=2)
    peer = serve(device)
    features = peer.negotiate()
    ram = GuestRam()
    ram.share(peer)
    ring = GuestRing(ram, 0, 64, features)
    ring.start(peer)
    return device, peer, ring


Guest = tuple[BlockDevice, Frontend, GuestRing]


def test_a_resize_is_seen_by_a_running_guest_and_bounds_its_requests(guest: Guest) -> None:
    device, peer, ring = guest
    ours, theirs = socket.socketpair()
    with ours:
        peer.do(Req.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        theirs.close()
        peer.config()
        assert ring.request(OUT, 2048, bytes(512))[0] == IOERR
        assert device.resize(2 << 20) is ConfigNotice.SENT
        assert select.select([ours], [], [], WAIT_S)[0]
        assert ours.recv(100)[:4] == b"\2\0\0\0"
        assert VirtioBlkConfig.unpack(peer.config()).capacity == 4096
        assert ring.request(OUT, 2048, b"x" * 512)[0] == OK
        assert device.resize(1 << 19) is ConfigNotice.SENT
        assert ring.request(OUT, 1024, bytes(512))[0] == IOERR
        assert ring.request(OUT, 1023, bytes(512))[0] == OK
    ring.close()


def test_the_guest_switches_the_cache_over_the_socket_and_others_are_refused(guest: Guest) -> None:
    device, peer, ring = guest
    peer.do(Req.SET_CONFIG, Config(32, 1, 0, b"\0"))
    assert not device.writeback
    assert peer.config(1, 32) == b"\0"
    assert ring.request(OUT, 0, bytes(512))[0] == OK
    peer.do(Req.SET_CONFIG, Config(32, 1, 1, b"\1"))
    assert device.writeback
    assert peer.tell(Req.SET_CONFIG, Config(0, 8, 0, bytes(8))) != 0
    assert peer.tell(Req.SET_CONFIG, Config(32, 1, 0, b"\2")) != 0
    ring.close()


def test_what_was_discarded_and_zeroed_comes_back_as_space_and_zeroes(guest: Guest) -> None:
    device, _, ring = guest
    image = Path(device.name)
    assert ring.request(OUT, 0, b"\xaa" * 65536)[0] == OK
    assert ring.request(FLUSH, 0)[0] == OK
    assert image.read_bytes()[:65536] == b"\xaa" * 65536
    segment = (0).to_bytes(8, "little") + (64).to_bytes(4, "little")
    if device.features & BlkFeature.DISCARD:
        full = image.stat().st_blocks
        assert ring.request(DISCARD, 0, segment + bytes(4))[0] == OK
        assert image.stat().st_blocks < full
    assert ring.request(ZEROES, 0, segment + bytes(4))[0] == OK
    assert image.read_bytes()[:65536] == bytes(32768) + b"\xaa" * 32768
    assert ring.request(DISCARD, 0, segment + b"\1\0\0\0")[0] == UNSUPP
    ring.close()


def test_statistics_are_read_while_requests_run(guest: Guest) -> None:
    device, _, ring = guest
    for _ in range(3):
        assert ring.request(OUT, 0, bytes(1024))[0] == OK
    assert ring.request(IN, 0, room=512)[0] == OK
    first = device.statistics()[0]
    assert (first["writes"], first["written_bytes"], first["reads"], first["read_bytes"]) == (3, 3072, 1, 512)
    assert device.info()["connected"] is True
    ring.close()


def test_a_stopped_ring_can_be_stopped_again_and_others_never_started(guest: Guest) -> None:
    _, peer, ring = guest
    assert ring.stop(peer) == ring.stop(peer) == 0
    assert peer.ask(Req.GET_VRING_BASE, VringState(1, 0)) == VringState(1, 0)
    ring.close()
