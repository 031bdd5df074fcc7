"""GET_INFLIGHT_FD and SET_INFLIGHT_FD against a real disk: what a dead predecessor took is answered once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.backend.frontend import INDIRECT_EVENT_V1, Frontend, GuestRam, GuestRing
from tests.backend.inflight import Part, stride

from vhostuser._native import InflightRegion
from vhostuser.backend import Server
from vhostuser.backend.device import PROTOCOL_FEATURES
from vhostuser.backend.inflight import KEEPSAKE_BYTES
from vhostuser.blk import BlockDevice
from vhostuser.disks import FileDisk
from vhostuser.protocol import FrontendRequest, Inflight, ProtocolFeature, VringState
from vhostuser.transport import listen

Req = FrontendRequest
OUT, OK = 1, 0
SIZE = 16
CELL = 1024
"""Bytes for one request: header, one sector, status."""


@pytest.fixture(params=["io_uring", "syscalls"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The socket and the image of a disk with 2 queues."""
    image, where = tmp_path / "disk.img", str(tmp_path / "disk.sock")
    image.write_bytes(bytes(1 << 20))
    with FileDisk(str(image), engine=request.param) as disk:
        device = BlockDevice(disk, num_queues=2)
        with Server(device, listen(where)):
            yield where, image
        device.close()


DRAINING = PROTOCOL_FEATURES & ~ProtocolFeature.GET_VRING_BASE_INFLIGHT
"""Everything, but that requests may be left in the region at a stop."""


class Predecessor:
    """A guest's ring with requests that a back-end took, left half-done and died."""

    def __init__(self, *, made: int, taken: int) -> None:
        self.ram = GuestRam()
        self.ring = GuestRing(self.ram, 0, SIZE, INDIRECT_EVENT_V1)
        self.region = InflightRegion.create(2, SIZE)
        self.part = Part(self.region)
        self.heads = [self.write(number) for number in range(made)]
        self.ring.driver.publish()
        self.part.set_header(desc_num=SIZE, used_idx=0)
        for number, head in enumerate(self.heads[:taken]):
            self.part.set_entry(head, inflight=1, counter=number)

    def write(self, number: int) -> int:
        """Make a write of one sector of its own."""
        at = self.ram.scratch + number * CELL
        view = memoryview(self.ram.arena)
        view[at : at + 16] = OUT.to_bytes(8, "little") + number.to_bytes(8, "little")
        view[at + 16 : at + 528] = bytes([number + 1]) * 512
        view[at + 528] = 0xFF
        return self.ring.driver.add([(at, 528)], [(at + 528, 1)])

    def status(self, number: int) -> int:
        return memoryview(self.ram.arena)[self.ram.scratch + number * CELL + 528]

    def connect(self, path: str, *, base: int, enable: bool = True, leaving: bool = True) -> Frontend:
        peer = Frontend.connect(path)
        peer.negotiate(protocol=None if leaving else DRAINING)
        peer.do(Req.SET_INFLIGHT_FD, Inflight(self.region.size, 0, 2, SIZE), [self.region.fd])
        self.ram.share(peer)
        self.ring.start(peer, base=base, enable=enable)
        return peer

    def answered(self, count: int) -> list[int]:
        heads: list[int] = []
        while len(heads) < count:
            heads += [head for head, _ in self.ring.wait()]
        return heads


@pytest.mark.covers("VHOST_USER_GET_INFLIGHT_FD", "VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD")
def test_a_front_end_gets_a_region_of_zeroes_for_the_queues_it_names(served: tuple[str, Path]) -> None:
    with Frontend.connect(served[0]) as peer:
        peer.negotiate()
        answer = peer.ask(Req.GET_INFLIGHT_FD, Inflight(0, 0, 2, 128))
        size = 2 * stride(128) + KEEPSAKE_BYTES
        assert answer == Inflight(size, 0, 2, 128)
        (fd,) = peer.fds
        with fd:
            assert os.pread(fd.fileno(), 1 << 20, 0) == bytes(size)


@pytest.mark.parametrize(("num_queues", "queue_size"), [(3, 128), (0, 128), (1, 0), (1, 32769), (1, 65535)])
def test_a_region_for_what_the_device_has_not_is_refused_and_the_connection_goes_on(
    served: tuple[str, Path], num_queues: int, queue_size: int
) -> None:
    with Frontend.connect(served[0]) as peer:
        peer.negotiate()
        assert peer.ask(Req.GET_INFLIGHT_FD, Inflight(0, 0, num_queues, queue_size)) == Inflight(0, 0, 0, 0)
        assert peer.fds == ()
        assert peer.tell(Req.SET_INFLIGHT_FD, Inflight(0, 0, num_queues, queue_size), [0]) != 0
        peer.barrier()


def test_a_region_in_a_descriptor_that_is_none_is_refused(served: tuple[str, Path]) -> None:
    with Frontend.connect(served[0]) as peer:
        peer.negotiate()
        read, write = os.pipe()
        with os.fdopen(read), os.fdopen(write):
            assert peer.tell(Req.SET_INFLIGHT_FD, Inflight(2 * stride(SIZE), 0, 2, SIZE), [read]) != 0
        peer.barrier()


def test_without_the_feature_there_is_no_region(served: tuple[str, Path]) -> None:
    with Frontend.connect(served[0]) as peer:
        peer.negotiate(protocol=ProtocolFeature.REPLY_ACK | ProtocolFeature.MQ)
        assert peer.tell_bluntly(Req.GET_INFLIGHT_FD, Inflight(0, 0, 2, 128)) == Inflight(0, 0, 0, 0).pack()


@pytest.mark.covers("VHOST_USER_SET_INFLIGHT_FD")
@pytest.mark.parametrize("base", [0, 3, 6, 999])
def test_what_a_predecessor_took_and_what_it_did_not_are_all_answered_once(served: tuple[str, Path], base: int) -> None:
    """QEMU names the used index as base, Cloud Hypervisor the available index: neither counts."""
    left = Predecessor(made=6, taken=3)
    with left.connect(served[0], base=base) as peer:
        assert sorted(left.answered(6)) == sorted(left.heads)
        assert [left.status(number) for number in range(6)] == [OK] * 6
        assert left.ring.stop(peer) == 6
        assert left.part.marked() == []
        assert left.part.used_idx == 6
    data = served[1].read_bytes()
    assert data[: 6 * 512] == b"".join(bytes([number + 1]) * 512 for number in range(6))
    left.ring.close()


def test_a_stop_answers_first_what_a_predecessor_took_even_if_the_ring_rests(served: tuple[str, Path]) -> None:
    """QEMU disables every ring before it asks for the base: a request may not be lost between the two."""
    left = Predecessor(made=6, taken=3)
    with left.connect(served[0], base=0, enable=False, leaving=False) as peer:
        assert left.ring.stop(peer) == 3
        assert sorted(left.answered(3)) == sorted(left.heads[:3])
        assert [left.status(number) for number in range(6)] == [OK] * 3 + [0xFF] * 3
    left.ring.close()


def test_a_front_end_that_leaves_finds_what_nobody_began_still_in_its_region(served: tuple[str, Path]) -> None:
    left = Predecessor(made=6, taken=3)
    with left.connect(served[0], base=0, enable=False):
        pass
    with Frontend.connect(served[0]) as peer:  # waits until the session before has ended
        peer.negotiate()
    assert left.part.marked() == left.heads[:3]
    assert left.ring.driver.reap() == []
    with left.connect(served[0], base=0):
        assert sorted(left.answered(6)) == sorted(left.heads)
    left.ring.close()


def test_the_driver_is_called_for_what_a_predecessor_answered_without_telling(served: tuple[str, Path]) -> None:
    left = Predecessor(made=0, taken=0)
    with left.connect(served[0], base=0):
        assert os.eventfd_read(left.ring.call) >= 1
    left.ring.close()


def test_a_region_of_another_ring_breaks_that_ring_alone(
    served: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    left = Predecessor(made=2, taken=2)
    left.part.set_header(desc_num=SIZE, used_idx=40000)
    with left.connect(served[0], base=0) as peer:
        other = GuestRing(left.ram, 1, SIZE, INDIRECT_EVENT_V1)
        other.start(peer)
        assert other.request(OUT, 100, bytes(512))[0] == OK
        peer.barrier()
        assert left.ring.stop(peer) == 0
        assert os.eventfd_read(left.ring.err) == 1
        assert left.ring.driver.reap() == []
        assert left.part.marked() == left.heads
        other.close()
    (line,) = [record.message for record in caplog.records if "is broken" in record.message]
    assert "ring 0 is broken: the in-flight region does not belong to this ring: used.idx is 0" in line
    left.ring.close()


@pytest.mark.parametrize("forget", [Req.RESET_DEVICE, None])
def test_a_reset_forgets_the_region_and_a_stop_does_not(served: tuple[str, Path], forget: Req | None) -> None:
    left = Predecessor(made=1, taken=0)
    with left.connect(served[0], base=0) as peer:
        left.answered(1)
        assert left.ring.stop(peer) == 1
        if forget is not None:
            peer.do(forget)
        left.ring.start(peer, base=1)
        left.write(1)
        left.ring.driver.publish()
        os.eventfd_write(left.ring.kick, 1)
        left.answered(1)
        assert left.part.used_idx == (1 if forget else 2)
        assert peer.ask(Req.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 2)
    left.ring.close()


def test_a_region_that_is_truncated_ends_the_connection_and_not_the_back_end(served: tuple[str, Path]) -> None:
    left = Predecessor(made=0, taken=0)
    file = os.memfd_create("inflight")
    with os.fdopen(file):
        os.ftruncate(file, 4096)
        with Frontend.connect(served[0]) as peer:
            peer.negotiate()
            peer.do(Req.SET_INFLIGHT_FD, Inflight(2 * stride(SIZE), 0, 2, SIZE), [file])
            left.ram.share(peer)
            left.ring.start(peer)
            os.ftruncate(file, 0)
            left.write(0)
            left.ring.driver.publish()
            os.eventfd_write(left.ring.kick, 1)
            assert peer.closed_by_peer()
    with Predecessor(made=2, taken=1).connect(served[0], base=0) as peer:
        peer.barrier()
    left.ring.close()
