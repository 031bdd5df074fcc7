"""Requests that storage fails, over a real connection: held, tried again, failed, replayed; and their rate."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.backend.frontend import INDIRECT_EVENT_V1, WAIT_S, Frontend, GuestRam, GuestRing
from tests.backend.inflight import Part

from vhostuser._native import DirtyLog, InflightRegion
from vhostuser.backend import Server
from vhostuser.blk import BlockDevice, ErrorAction, ErrorPolicy, RateLimit
from vhostuser.disks import Disk, FileDisk, MemoryDisk
from vhostuser.disks.faulty import Faults, FaultyDisk
from vhostuser.errors import UsageError
from vhostuser.protocol import F_LOG_ALL, F_PROTOCOL_FEATURES, U64, FrontendRequest, Inflight, Log
from vhostuser.transport import Transport, listen

Req = FrontendRequest
OUT, FLUSH = 1, 4
OK, IOERR, NONE = 0, 1, 0xFF
SIZE = 16
CELL = 1024
HOLD = ErrorPolicy(ErrorAction.HOLD, ErrorAction.HOLD)
RETRY = ErrorPolicy(ErrorAction.RETRY, ErrorAction.RETRY)
ONCE_FULL = Faults(error_write=1.0, errno=errno.ENOSPC, error_limit=1)


def until(what: str, state: Callable[[], bool]) -> None:
    """Wait for a state that comes by itself."""
    end = time.monotonic() + WAIT_S
    while not state():
        assert time.monotonic() < end, what
        os.sched_yield()


class Guest:
    """A guest with one ring, which outlives its connections, and a region for what is in flight."""

    def __init__(self) -> None:
        self.ram = GuestRam()
        self.ring = GuestRing(self.ram, 0, SIZE, INDIRECT_EVENT_V1)
        self.region = InflightRegion.create(1, SIZE)
        self.part = Part(self.region)

    def begin(self, peer: Frontend, *, tracked: bool = False) -> None:
        peer.negotiate()
        if tracked:
            peer.do(Req.SET_INFLIGHT_FD, Inflight(self.region.size, 0, 1, SIZE), [self.region.fd])
        self.ram.share(peer)
        self.ring.start(peer)

    def send(self, number: int, kind: int = OUT) -> None:
        """A write of sector ``number`` with that many's bytes, or a FLUSH; its status is read by that number."""
        at = self.ram.scratch + number * CELL
        view = memoryview(self.ram.arena)
        view[at : at + 16] = kind.to_bytes(8, "little") + number.to_bytes(8, "little")
        view[at + 16 : at + 528] = bytes([number + 1]) * 512
        view[at + 528] = NONE
        self.ring.submit([(at, 528 if kind == OUT else 16)], [(at + 528, 1)])

    def status(self, number: int) -> int:
        return memoryview(self.ram.arena)[self.ram.scratch + number * CELL + 528]


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.ring.close()


Make = Callable[..., BlockDevice]


@pytest.fixture
def make() -> Iterator[Make]:
    """A device whose storage is made faulty."""
    with ExitStack() as stack:

        def device(faults: Faults, errors: ErrorPolicy, disk: Disk | None = None) -> BlockDevice:
            faulty = stack.enter_context(FaultyDisk(disk or MemoryDisk(1 << 20), faults))
            made = BlockDevice(faulty, errors=errors)
            stack.callback(made.close)
            return made

        yield device


def held(device: BlockDevice) -> int:
    return device.statistics()[0]["held"]


Serve = Callable[[BlockDevice], Frontend]


def test_a_held_request_is_listed_and_completes_when_it_is_tried_again(
    make: Make, serve: Serve, guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device = make(ONCE_FULL, HOLD)
    guest.begin(serve(device))
    guest.send(3)
    until("the write is held", lambda: held(device) == 1)
    (one,) = device.requests()
    assert (one.queue, one.kind, one.sector, one.bytes) == (0, "write", 3, 512)
    assert (one.state, one.errno) == ("held", errno.ENOSPC)
    assert guest.status(3) == NONE
    assert device.retry((0, one.head + 1)) == 0
    assert device.retry((0, one.head)) == 1
    guest.ring.wait()
    assert guest.status(3) == OK
    assert device.requests() == []
    until("the log says so", lambda: "no failed request is kept any more: 1 done" in caplog.text)
    assert caplog.text.count("queue 0: a request failed and is held") == 1
    assert "write of 512 bytes at sector 3: No space left on device" in caplog.text


def test_a_held_request_fails_when_it_is_told_to(make: Make, serve: Serve, guest: Guest) -> None:
    device = make(ONCE_FULL, HOLD)
    guest.begin(serve(device))
    guest.send(3)
    until("the write is held", lambda: held(device) == 1)
    assert device.fail() == 1
    guest.ring.wait()
    assert guest.status(3) == IOERR
    assert device.statistics()[0]["errors"] == 1


def test_a_retried_request_needs_nobody(make: Make, serve: Serve, guest: Guest) -> None:
    device = make(ONCE_FULL, RETRY)
    guest.begin(serve(device))
    guest.send(3)
    guest.ring.wait()
    assert guest.status(3) == OK
    counters = device.statistics()[0]
    assert (counters["retried"], counters["retrying"], counters["errors"]) == (1, 0, 0)


def test_by_default_the_guest_is_told(make: Make, serve: Serve, guest: Guest) -> None:
    device = make(ONCE_FULL, ErrorPolicy())
    guest.begin(serve(device))
    guest.send(3)
    guest.ring.wait()
    assert guest.status(3) == IOERR


@pytest.mark.parametrize("errors", [HOLD, RETRY], ids=["hold", "retry"])
def test_a_flush_is_never_kept(make: Make, serve: Serve, guest: Guest, errors: ErrorPolicy) -> None:
    device = make(Faults(error_flush=1.0, error_limit=1), errors)
    guest.begin(serve(device))
    guest.send(3, FLUSH)
    guest.ring.wait()
    assert guest.status(3) == IOERR


@pytest.mark.parametrize("reset", [False, True], ids=["GET_VRING_BASE", "RESET_DEVICE"])
def test_who_stops_the_ring_gets_an_answer_when_the_time_to_drain_is_over(
    make: Make, serve: Serve, guest: Guest, reset: bool
) -> None:
    device = make(ONCE_FULL, HOLD)
    peer = serve(device)  # waits 0.2 s for storage
    guest.begin(peer)
    guest.send(3)
    until("the write is held", lambda: held(device) == 1)
    start = time.monotonic()
    if reset:
        peer.do(Req.RESET_DEVICE)
    else:
        assert guest.ring.stop(peer) == 1
    assert time.monotonic() - start >= 0.2
    assert [head for head, _ in guest.ring.wait()]
    assert guest.status(3) == IOERR
    peer.barrier()


def test_who_changes_memory_gets_an_answer_and_the_ring_goes_on(make: Make, serve: Serve, guest: Guest) -> None:
    device = make(ONCE_FULL, HOLD)
    peer = serve(device)
    guest.begin(peer)
    guest.send(3)
    until("the write is held", lambda: held(device) == 1)
    guest.ram.share(peer)
    guest.ring.wait()
    assert guest.status(3) == IOERR
    guest.send(4)
    guest.ring.wait()
    assert guest.status(4) == OK


def test_who_begins_a_log_that_lacks_bits_gets_an_answer_and_the_ring_goes_on(
    make: Make, serve: Serve, guest: Guest
) -> None:
    device = make(ONCE_FULL, HOLD)
    peer = serve(device)
    guest.begin(peer)
    guest.send(3)
    until("the write is held", lambda: held(device) == 1)
    log = DirtyLog.create(guest.ram.size // 4096 // 8 // 2)
    assert peer.ask(Req.SET_LOG_BASE, Log(log.size, 0), [log.fd]) == Log(log.size, 0)
    assert held(device) == 1
    peer.do(Req.SET_FEATURES, U64(INDIRECT_EVENT_V1 | F_PROTOCOL_FEATURES | F_LOG_ALL))
    guest.ring.wait()
    assert guest.status(3) == IOERR
    assert not any(log.take()), "it was taken when nothing was logged"
    guest.send(4)
    guest.ring.wait()
    assert guest.status(4) == OK
    assert any(log.take())


@pytest.mark.parametrize("errors", [HOLD, RETRY], ids=["hold", "retry"])
@pytest.mark.parametrize("engine", ["io_uring", "syscalls"])
def test_a_kept_request_outlives_its_connection_in_the_region_and_is_done_once_by_the_next(
    make: Make, guest: Guest, tmp_path: Path, engine: str, errors: ErrorPolicy
) -> None:
    image, where = tmp_path / "disk.img", str(tmp_path / "disk.sock")
    image.write_bytes(bytes(1 << 20))
    device = make(ONCE_FULL, errors, FileDisk(str(image), engine=engine))
    with Server(device, listen(where)):
        with Frontend.connect(where) as peer:
            guest.begin(peer, tracked=True)
            guest.send(3)
            until("the write is kept", lambda: held(device) + device.statistics()[0]["retrying"] == 1)
            (mark,) = guest.part.marked()
        until("the session is over", lambda: not device.connected)
        assert guest.part.marked() == [mark]
        assert guest.status(3) == NONE
        assert guest.ring.driver.used_index == 0
        with Frontend.connect(where) as peer:
            guest.begin(peer, tracked=True)
            assert [head for head, _ in guest.ring.wait()] == [mark]
            assert guest.status(3) == OK
            peer.barrier()
            assert guest.part.marked() == []
            assert guest.ring.driver.reap() == []
    assert image.read_bytes()[1536:2048] == bytes([4]) * 512


def test_without_a_region_a_kept_request_goes_with_its_connection(make: Make, guest: Guest, tmp_path: Path) -> None:
    where = str(tmp_path / "disk.sock")
    device = make(ONCE_FULL, HOLD)
    with Server(device, listen(where)):
        with Frontend.connect(where) as peer:
            guest.begin(peer)
            guest.send(3)
            until("the write is held", lambda: held(device) == 1)
        until("the session is over", lambda: not device.connected)
        assert (held(device), device.requests()) == (0, [])
        other = Guest()
        with Frontend.connect(where) as peer:
            other.begin(peer)
            other.send(1)
            other.ring.wait()
            assert other.status(1) == OK
        other.ring.close()
    assert guest.status(3) == NONE


@pytest.mark.parametrize("tracked", [False, True])
def test_a_server_that_ends_answers_what_is_held_only_where_it_would_be_lost(
    make: Make, guest: Guest, tracked: bool
) -> None:
    device = make(Faults(error_write=1.0), HOLD)
    ours, theirs = socket.socketpair()
    with Frontend(ours) as peer:
        with Server(device, Transport(theirs)):
            guest.begin(peer, tracked=tracked)
            guest.send(3)
            until("the write is held", lambda: held(device) == 1)
        assert guest.status(3) == (NONE if tracked else IOERR)
        assert len(guest.part.marked()) == int(tracked)


def test_a_rate_limit_is_kept_and_can_be_changed_while_a_guest_waits(make: Make, serve: Serve, guest: Guest) -> None:
    device = make(Faults(), ErrorPolicy())
    device.rate_limit = RateLimit(bps=512)
    assert device.info()["rate_limit"] == {"iops": 0, "bps": 512}
    guest.begin(serve(device))
    guest.send(0)
    guest.ring.wait()
    guest.send(1)
    assert device.statistics()[0]["writes"] == 1
    device.rate_limit = RateLimit()
    guest.ring.wait()
    assert guest.status(1) == OK


@pytest.mark.parametrize("text", ["iops=100", "bps=1048576", "iops=5,bps=7", "none"])
def test_a_rate_limit_is_written_as_it_is_read(text: str) -> None:
    assert str(RateLimit.parse(text)) == text


def test_rates_have_suffixes() -> None:
    assert RateLimit.parse(" bps = 20M , iops=1K") == RateLimit(iops=1024, bps=20 << 20)


@pytest.mark.parametrize(
    "text", ["", "100", "iops", "iops=", "iops=-1", "iops=1,iops=2", "reads=5", "bps=9E", "bps=1.5"]
)
def test_a_senseless_rate_limit_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        RateLimit.parse(text)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_senseless_time_for_retries_is_refused(seconds: float) -> None:
    with MemoryDisk(1 << 20) as disk, pytest.raises(UsageError):
        BlockDevice(disk, errors=ErrorPolicy(retry_for_s=seconds))
