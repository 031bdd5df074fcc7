"""A disk moves from one back-end to another on one image: only the one whose rings run touches it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.backend.frontend import INDIRECT_EVENT_V1, Frontend, GuestRam, GuestRing

from vhostuser.backend import Server
from vhostuser.blk import BlockDevice
from vhostuser.disks import FileDisk
from vhostuser.errors import UsageError
from vhostuser.protocol import U64, Config, FrontendRequest, VringFd, VringState
from vhostuser.transport import listen

Req = FrontendRequest
IN, OUT, OK = 0, 1, 0
MIB = 1 << 20
WRITEBACK = 32


class Side:
    """One back-end, and our connection to it."""

    def __init__(self, image: Path, stack: ExitStack, *, incoming: bool) -> None:
        where = str(image.with_name("destination.sock" if incoming else "source.sock"))
        self.disk = stack.enter_context(FileDisk(image, incoming=incoming, lock_timeout_s=0.05))
        self.device = BlockDevice(self.disk, num_queues=2)
        stack.callback(self.device.close)
        stack.enter_context(Server(self.device, listen(where)))
        self.where = where
        self.peer = stack.enter_context(Frontend.connect(where))

    @property
    def image(self) -> str:
        return str(self.device.info()["image"])


class Migration:
    """A guest with two rings, between two back-ends."""

    def __init__(self, image: Path, stack: ExitStack) -> None:
        self.source, self.destination = (Side(image, stack, incoming=incoming) for incoming in (False, True))
        self.ram = GuestRam()
        for side in (self.source, self.destination):
            side.peer.negotiate()
            self.ram.share(side.peer)
        self.rings = [GuestRing(self.ram, index, 16, INDIRECT_EVENT_V1) for index in range(2)]
        for ring in self.rings:
            stack.callback(ring.close)
        self.start(self.source)

    def start(self, side: Side) -> None:
        for ring in self.rings:
            ring.start(side.peer, base=ring.driver.used_index)

    def stop(self, side: Side) -> list[int]:
        return [ring.stop(side.peer) for ring in self.rings]

    def write(self, sector: int) -> None:
        for ring in self.rings:
            assert ring.request(OUT, sector + ring.index, bytes([sector + ring.index + 1]) * 512) == (OK, b"")

    def check(self, sector: int) -> None:
        for ring in self.rings:
            wanted = bytes([sector + ring.index + 1]) * 512
            assert ring.request(IN, sector + ring.index, room=512) == (OK, wanted)

    @property
    def images(self) -> tuple[str, str]:
        return self.source.image, self.destination.image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def migration(image: Path) -> Iterator[Migration]:
    with ExitStack() as stack:
        yield Migration(image, stack)


def refused(side: Side, ring: GuestRing) -> bool:
    """Start the ring as far as it goes; whether its last step is refused."""
    side.peer.do(Req.SET_VRING_NUM, VringState(ring.index, ring.size))
    side.peer.do(Req.SET_VRING_BASE, VringState(ring.index, ring.driver.used_index))
    side.peer.do(Req.SET_VRING_ADDR, ring.addr())
    return side.peer.tell(Req.SET_VRING_KICK, VringFd.of(ring.index), [ring.kick]) != 0


def test_the_guest_goes_on_where_it_was_and_finds_what_it_wrote(migration: Migration) -> None:
    migration.write(0)
    assert migration.images == ("held", "waiting")
    assert migration.stop(migration.source) == [1, 1]
    assert migration.images == ("lent", "waiting"), "before the base of the last ring is told"
    migration.start(migration.destination)
    assert migration.images == ("lent", "held")
    migration.check(0)
    migration.write(10)
    assert migration.stop(migration.destination) == [3, 3]


def test_the_image_is_kept_while_one_ring_still_runs(migration: Migration) -> None:
    migration.rings[0].stop(migration.source.peer)
    assert migration.images == ("held", "waiting")
    assert migration.rings[1].request(OUT, 0, bytes(512)) == (OK, b"")


def test_a_destination_that_starts_too_early_is_refused_and_nobody_is_harmed(
    migration: Migration, caplog: pytest.LogCaptureFixture
) -> None:
    side = migration.destination
    assert refused(side, migration.rings[0])
    (line,) = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
    assert "SET_VRING_KICK is refused: " in line
    assert "it is not handed over" in line
    migration.write(0)
    migration.stop(migration.source)
    migration.start(side)
    migration.check(0)


def test_a_start_without_an_acknowledgement_ends_the_connection_when_the_image_is_not_to_be_had(
    migration: Migration,
) -> None:
    side, ring = migration.destination, migration.rings[0]
    side.peer.do(Req.SET_VRING_NUM, VringState(0, ring.size))
    side.peer.do(Req.SET_VRING_ADDR, ring.addr())
    side.peer.send(Req.SET_VRING_KICK, VringFd.of(0), [ring.kick])
    assert side.peer.closed_by_peer()
    migration.write(0)


def test_a_ring_that_is_kicked_before_its_size_is_known_starts_with_that_when_the_image_is_there(
    migration: Migration,
) -> None:
    peer, ring = migration.destination.peer, migration.rings[0]
    peer.do(Req.SET_VRING_ADDR, ring.addr())
    peer.do(Req.SET_VRING_CALL, VringFd.of(0), [ring.call])
    peer.do(Req.SET_VRING_KICK, VringFd.of(0), [ring.kick])
    peer.do(Req.SET_VRING_ENABLE, VringState(0, 1))
    assert peer.tell(Req.SET_VRING_NUM, VringState(0, ring.size)) != 0
    migration.write(0)
    bases = migration.stop(migration.source)
    peer.do(Req.SET_VRING_BASE, VringState(0, bases[0]))
    peer.do(Req.SET_VRING_NUM, VringState(0, ring.size))
    assert migration.images == ("lent", "held")
    assert ring.request(IN, 0, room=512) == (OK, b"\1" * 512)


def test_a_failed_migration_goes_on_at_the_source(migration: Migration) -> None:
    for sector in (0, 2, 4):
        migration.write(sector)
        migration.stop(migration.source)
        migration.start(migration.source)
        migration.check(sector)
    assert migration.images == ("held", "waiting")


def test_the_source_is_refused_once_the_destination_has_begun(
    migration: Migration, caplog: pytest.LogCaptureFixture
) -> None:
    migration.stop(migration.source)
    migration.start(migration.destination)
    assert refused(migration.source, migration.rings[0])
    assert any("it was handed over to another server" in record.getMessage() for record in caplog.records)
    migration.write(0)


def test_a_destination_whose_first_ring_cannot_start_leaves_the_image_to_the_source(migration: Migration) -> None:
    migration.stop(migration.source)
    side, ring = migration.destination, migration.rings[0]
    side.peer.do(Req.SET_VRING_NUM, VringState(0, ring.size))
    side.peer.do(Req.SET_VRING_ADDR, ring.addr())
    with open("/dev/null", "rb") as file:
        assert side.peer.tell(Req.SET_VRING_KICK, VringFd.of(0), [file.fileno()]) != 0
    assert migration.images == ("lent", "waiting")
    migration.start(migration.source)
    migration.write(0)


@pytest.mark.parametrize("end", ["leave", "reset"])
def test_rings_that_end_otherwise_free_the_image_too(migration: Migration, end: str) -> None:
    migration.write(0)
    if end == "reset":
        migration.source.peer.do(Req.RESET_DEVICE)
    else:
        migration.source.peer.close()
        with Frontend.connect(migration.source.where) as again:  # waits until the session before has ended
            again.negotiate()
    assert migration.source.image == "lent"
    migration.start(migration.destination)
    migration.check(0)


def test_a_size_that_changed_meanwhile_is_served_and_told(migration: Migration) -> None:
    before = migration.destination.peer.config(8)
    migration.source.device.resize(2 * MIB)
    migration.stop(migration.source)
    assert migration.destination.peer.config(8) == before
    migration.start(migration.destination)
    assert migration.destination.device.size == 2 * MIB
    assert int.from_bytes(migration.destination.peer.config(8), "little") == 2 * MIB // 512
    assert migration.rings[0].request(OUT, 2 * MIB // 512 - 1, bytes(512)) == (OK, b"")


def test_a_disk_that_has_become_nothing_is_not_started_and_stays_the_source_s(migration: Migration) -> None:
    migration.stop(migration.source)
    os.truncate(migration.source.disk.name, 0)
    assert refused(migration.destination, migration.rings[0])
    assert migration.images == ("lent", "waiting")


def test_a_cache_that_the_guest_switched_off_is_off_at_the_destination_and_its_driver_told(
    migration: Migration,
) -> None:
    source, destination = migration.source, migration.destination
    source.peer.do(Req.SET_CONFIG, Config(WRITEBACK, 1, 0, b"\0"))
    migration.stop(source)
    assert destination.peer.config(1, WRITEBACK) == b"\1"
    generation = destination.device.config_generation
    migration.start(destination)
    assert not destination.device.writeback
    assert destination.peer.config(1, WRITEBACK) == b"\0"
    assert destination.device.config_generation == generation + 1
    destination.peer.do(Req.SET_FEATURES, U64(INDIRECT_EVENT_V1 | 1 << 30 | 1 << 9 | 1 << 11))
    assert not destination.device.writeback, "logging is switched with features on running rings"


def test_only_who_has_the_image_resizes_it(migration: Migration) -> None:
    with pytest.raises(UsageError, match="another server has it"):
        migration.destination.device.resize(2 * MIB)
    with pytest.raises(UsageError, match="another server has it"):
        migration.destination.device.resize(MIB // 2)
    assert migration.destination.device.size == MIB
