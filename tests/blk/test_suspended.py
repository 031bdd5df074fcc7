"""A disk whose rings are all stopped is suspended: whatever is done to it, its guest sees nothing of it.

Guest memory, the dirty log, the in-flight region, the descriptors of the rings and the back-end channel stay as they
are, while every message is answered (vhost-user: Suspended device state).
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.backend.frontend import INDIRECT_EVENT_V1, WAIT_S, Frontend, GuestRam, GuestRing
from tests.backend.inflight import Part

from vhostuser._native import DirtyLog, InflightRegion
from vhostuser.backend import ConfigNotice, Server
from vhostuser.blk import BlockDevice, ErrorAction, ErrorPolicy
from vhostuser.disks import MemoryDisk
from vhostuser.disks.faulty import Faults, FaultyDisk
from vhostuser.fds import Fd
from vhostuser.protocol import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    BackendRequest,
    Config,
    DeviceStateParams,
    DeviceStateReply,
    Direction,
    FrontendRequest,
    Inflight,
    Log,
    Phase,
    VringAddr,
    VringFd,
    VringState,
)
from vhostuser.transport import listen
from vhostuser.virtio.blk import BlkFeature

Req = FrontendRequest
OUT, FLUSH, OK = 1, 4, 0
MIB = 1 << 20
SIZE = 16
FEATURES = INDIRECT_EVENT_V1 | int(BlkFeature.FLUSH | BlkFeature.CONFIG_WCE | BlkFeature.MQ)
CHANGED = bytes((BackendRequest.CONFIG_CHANGE_MSG, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0))
"""CONFIG_CHANGE_MSG on the wire."""


class Stage:
    """Two rings that have run, with requests left in the region of the first, and that are stopped now."""

    def __init__(self, where: str, stack: ExitStack) -> None:
        storage = FaultyDisk(MemoryDisk(MIB), Faults(error_write=1.0, error_limit=2))
        disk = stack.enter_context(storage)
        self.device = BlockDevice(disk, num_queues=2, errors=ErrorPolicy(on_error=ErrorAction.HOLD))
        stack.callback(self.device.close)
        stack.enter_context(Server(self.device, listen(where)))
        self.peer = stack.enter_context(Frontend.connect(where))
        self.peer.negotiate(FEATURES)
        self.channel, theirs = (stack.enter_context(one) for one in socket.socketpair())
        self.peer.config()
        self.peer.do(Req.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        self.region = InflightRegion.create(2, SIZE)
        self.part = Part(self.region)
        self.peer.do(Req.SET_INFLIGHT_FD, Inflight(self.region.size, 0, 2, SIZE), [self.region.fd])
        self.ram = GuestRam()
        self.ram.share(self.peer)
        self.rings = [GuestRing(self.ram, index, SIZE, FEATURES) for index in range(2)]
        for ring in self.rings:
            stack.callback(ring.close)
            ring.start(self.peer)
        self.log = DirtyLog.create(self.ram.size // 4096 // 8)
        self.set_log(self.log)
        self.heads = [self.write(self.rings[0], number) for number in range(2)]
        while self.device.statistics()[0]["held"] != 2:
            select.select([], [], [], 0.001)
        assert self.rings[1].request(FLUSH, 0)[0] == OK
        self.bases = [ring.stop(self.peer) for ring in self.rings]
        self.write(self.rings[1], 2)  # whoever kicks now is late
        self.fds = [fd for ring in self.rings for fd in (ring.call, ring.err)]
        for fd in select.select(self.fds, [], [], 0)[0]:
            os.eventfd_read(fd)
        self.log.take()
        self.fresh: list[int] = []
        self.stack = stack
        self.before = self.seen()

    def write(self, ring: GuestRing, number: int) -> int:
        at = self.ram.scratch + 4096 * (number + 1)
        view = memoryview(self.ram.arena)
        view[at : at + 16] = OUT.to_bytes(8, "little") + number.to_bytes(8, "little")
        view[at + 528] = 0xFF
        return ring.submit([(at, 528)], [(at + 528, 1)])

    def set_log(self, log: DirtyLog) -> None:
        assert self.peer.ask(Req.SET_LOG_BASE, Log(log.size, 0), [log.fd]) == Log(log.size, 0)
        self.peer.do(Req.SET_FEATURES, U64(FEATURES | F_PROTOCOL_FEATURES | F_LOG_ALL))
        for ring in self.rings:
            plain = ring.addr()
            places = (plain.descriptor, plain.used, plain.available)
            self.peer.do(Req.SET_VRING_ADDR, VringAddr(ring.index, 1, *places, ring.places[2]))

    def seen(self) -> tuple[bytes, bytes]:
        """What the guest and the front-end can see of memory."""
        return bytes(memoryview(self.ram.arena)), bytes(self.part.bytes)

    def eventfd(self) -> int:
        """A descriptor for the back-end that must stay silent, too."""
        fd = self.stack.enter_context(Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)))
        self.fresh.append(fd.fileno())
        return fd.fileno()

    def check_silence(self) -> None:
        """Everything asked so far was carried out, by the session and the workers, and nobody has seen anything."""
        self.peer.barrier()
        assert self.device.retry() == 0, "asks every worker, and waits for its answer"
        assert self.seen() == self.before
        assert not any(self.log.take())
        assert not select.select([*self.fds, *self.fresh, self.channel], [], [], 0)[0]

    def go_on(self) -> None:
        for ring, base in zip(self.rings, self.bases, strict=True):
            ring.start(self.peer, base=base)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(str(tmp_path / "disk.sock"), stack)


def resize(stage: Stage) -> None:
    assert stage.device.resize(2 * MIB) is ConfigNotice.DEFERRED


def shrink(stage: Stage) -> None:
    assert stage.device.resize(MIB // 2) is ConfigNotice.DEFERRED


def switch_the_cache(stage: Stage) -> None:
    for value in (0, 1, 0):
        stage.peer.do(Req.SET_CONFIG, Config(32, 1, 0, bytes([value])))


def kick_late(stage: Stage) -> None:
    for ring in stage.rings:
        for _ in range(3):
            os.eventfd_write(ring.kick, 1)


def enable_and_disable(stage: Stage) -> None:
    for value in (0, 1, 1, 0, 1):
        for index in range(2):
            stage.peer.do(Req.SET_VRING_ENABLE, VringState(index, value))


def replace_descriptors(stage: Stage) -> None:
    for index in range(2):
        stage.peer.do(Req.SET_VRING_CALL, VringFd.of(index), [stage.eventfd()])
        stage.peer.do(Req.SET_VRING_ERR, VringFd.of(index), [stage.eventfd()])


def swap_the_log(stage: Stage) -> None:
    before, stage.log = stage.log, DirtyLog.create(stage.log.size)
    stage.set_log(stage.log)
    assert not any(before.take())


def end_logging(stage: Stage) -> None:
    stage.peer.do(Req.SET_FEATURES, U64(FEATURES | F_PROTOCOL_FEATURES))
    for ring in stage.rings:
        stage.peer.do(Req.SET_VRING_ADDR, ring.addr())


def change_memory(stage: Stage) -> None:
    stage.ram.share(stage.peer)


def describe_rings_anew(stage: Stage) -> None:
    for ring, base in zip(stage.rings, stage.bases, strict=True):
        stage.peer.do(Req.SET_VRING_NUM, VringState(ring.index, ring.size))
        stage.peer.do(Req.SET_VRING_BASE, VringState(ring.index, base))
        stage.peer.do(Req.SET_VRING_ADDR, ring.addr())


def name_the_region_again(stage: Stage) -> None:
    region = stage.region
    stage.peer.do(Req.SET_INFLIGHT_FD, Inflight(region.size, 0, 2, SIZE), [region.fd])


def look_at_it(stage: Stage) -> None:
    assert stage.device.statistics()[0]["in_flight"] == 0
    assert stage.device.requests() == []
    stage.device.info()
    stage.peer.config()
    stage.peer.number(Req.GET_QUEUE_NUM)
    stage.peer.number(Req.GET_STATUS)


def save_its_state(stage: Stage) -> None:
    read, write = (stage.stack.enter_context(Fd(number)) for number in os.pipe())
    params = DeviceStateParams(Direction.SAVE, Phase.STOPPED)
    assert stage.peer.ask(Req.SET_DEVICE_STATE_FD, params, [write.fileno()]) == DeviceStateReply.of()
    assert stage.peer.number(Req.CHECK_DEVICE_STATE) == 0
    assert len(os.read(read.fileno(), 4096)) == 128


def decide_about_requests(stage: Stage) -> None:
    assert stage.device.retry() == 0
    assert stage.device.fail() == 0


def stop_again(stage: Stage) -> None:
    assert [ring.stop(stage.peer) for ring in stage.rings] == stage.bases


DISTURBANCES: list[Callable[[Stage], None]] = [
    resize,
    shrink,
    switch_the_cache,
    kick_late,
    enable_and_disable,
    replace_descriptors,
    swap_the_log,
    end_logging,
    change_memory,
    describe_rings_anew,
    name_the_region_again,
    look_at_it,
    save_its_state,
    decide_about_requests,
    stop_again,
]


@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_nobody_sees_what_is_done_to_a_suspended_disk(stage: Stage, disturb: Callable[[Stage], None]) -> None:
    stage.check_silence()
    disturb(stage)
    stage.check_silence()


def test_all_of_it_in_a_row_is_not_seen_and_then_everything_goes_on(stage: Stage) -> None:
    for disturb in [*DISTURBANCES, *reversed(DISTURBANCES)]:
        disturb(stage)
        stage.check_silence()
    stage.go_on()
    done = [head for ring in stage.rings for head in answered(ring, 2 if ring.index == 0 else 1)]
    assert sorted(done[:2]) == sorted(stage.heads)
    view = memoryview(stage.ram.arena)
    assert [view[stage.ram.scratch + 4096 * (number + 1) + 528] for number in range(3)] == [OK] * 3
    assert stage.part.marked() == []


def answered(ring: GuestRing, count: int) -> list[int]:
    heads: list[int] = []
    while len(heads) < count:
        heads += [head for head, _ in ring.wait()]
    return heads


def test_the_news_of_a_change_come_once_the_first_ring_runs_again(stage: Stage) -> None:
    resize(stage)
    stage.check_silence()
    ring = stage.rings[1]
    ring.start(stage.peer, base=stage.bases[1])
    assert select.select([stage.channel], [], [], WAIT_S)[0], "the driver is never told"
    assert stage.channel.recv(100) == CHANGED
    assert int.from_bytes(stage.peer.config(8), "little") == 2 * MIB // 512
    stage.rings[0].start(stage.peer, base=stage.bases[0])
    stage.peer.barrier()
    assert not select.select([stage.channel], [], [], 0)[0], "once is enough"


def test_a_change_that_was_read_meanwhile_is_no_news(stage: Stage) -> None:
    resize(stage)
    assert int.from_bytes(stage.peer.config(8), "little") == 2 * MIB // 512
    stage.go_on()
    stage.peer.barrier()
    assert not select.select([stage.channel], [], [], 0)[0]
