"""The dirty log of the host side: what is said about it and in which order, what is read, what outlives what."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
from tests.frontend import fakes
from tests.frontend.conftest import Serve
from tests.frontend.fakes import FakeBackend, Hangup, Received
from tests.frontend.test_client import VERSION_1, close, memory_for, write_sector

from vhostuser._native import DriverRing
from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.errors import BackendRefused, BackendUnfit, SetupError
from vhostuser.frontend import MOVABLE, DirtyPages, HostDevice, HostLog, HostQueue, SharedMemory

PAGE = 4096
LOGGING = fakes.ALL & ~fakes.BACKEND_REQ | fakes.LOG_SHMFD
FEATURES = fakes.SEG_MAX | fakes.VERSION_1 | fakes.PROTOCOL | fakes.LOG_ALL


def pages_of(dirty: DirtyPages) -> set[int]:
    """The slow way."""
    return {page for page in range(8 * len(dirty.bits)) if dirty.bits[page // 8] >> page % 8 & 1}


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_runs_are_the_pages_in_order_and_as_long_as_can_be(density: float) -> None:
    rng = random.Random(density)
    pages = {page for page in range(2000) if rng.random() < density}
    bits = bytearray(250)
    for page in pages:
        bits[page // 8] |= 1 << page % 8
    dirty = DirtyPages(bytes(bits))
    assert len(dirty) == len(pages)
    assert bool(dirty) == bool(pages)
    runs = list(dirty.runs())
    assert {page for start, length in runs for page in range(start // PAGE, (start + length) // PAGE)} == pages
    for (start, length), (following, _) in pairwise(runs):
        assert start + length < following, "adjacent pages are one run"
    assert all((page * PAGE + 7 in dirty) == (page in pages) for page in range(2100))


def test_the_pages_of_both_of_two_logs_are_in_their_union() -> None:
    union = DirtyPages(b"\x01\x80") | DirtyPages(b"\x02")
    assert list(union.runs()) == [(0, 2 * PAGE), (15 * PAGE, PAGE)]


@contextmanager
def fake(**options: object) -> Iterator[tuple[FakeBackend, HostDevice, SharedMemory, list[HostQueue[DriverRing]]]]:
    """A back-end whose rings run, and what it has been told since is in ``log``."""
    with FakeBackend(**{"features": FEATURES, "protocol": LOGGING} | options) as backend:  # type: ignore[arg-type]
        device = HostDevice(backend.give(), features=VERSION_1, protocol_features=MOVABLE)
        device.realize()
        memory, queues = memory_for(2)
        device.start(memory, queues)
        backend.log.clear()
        yield backend, device, memory, queues
        close(device, queues)


def told(backend: FakeBackend) -> list[tuple[int, bool]]:
    """The numbers of the messages about the log, and whether each turns logging on."""
    said = []
    for received in backend.log:
        on = True
        if received.request == fakes.SET_FEATURES:
            on = bool(received.number & fakes.LOG_ALL)
        elif received.request == fakes.SET_VRING_ADDR:
            on = bool(received.payload[4])
        said.append((received.request, on))
    return said


def test_a_log_begins_and_ends_in_the_order_of_qemu_or_ends_in_that_of_cloud_hypervisor() -> None:
    features, addr, base = fakes.SET_FEATURES, fakes.SET_VRING_ADDR, fakes.SET_LOG_BASE
    with fake(queues=2) as (backend, device, memory, _):
        device.start_log()
        assert told(backend) == [(base, True), (features, True), (addr, True), (addr, True)]
        used = struct.unpack_from("=IIQQQQ", backend.payloads(addr)[1])
        assert used[5] - memory.guest_addr == used[3] - memory.user_addr, "the log is told in guest addresses"
        assert len(backend.dirty or b"") * 8 * PAGE >= memory.guest_addr + memory.size
        assert len(backend.dirty or b"") % 8 == 0
        backend.log.clear()
        device.stop_log()
        assert told(backend) == [(features, False), (addr, False), (addr, False)]
        device.start_log()
        backend.log.clear()
        device.stop_log(rings_first=True)
        assert told(backend) == [(addr, False), (addr, False), (features, False)]


def test_a_log_that_is_swapped_is_read_after_the_back_end_has_the_new_one() -> None:
    with fake() as (backend, device, memory, _):
        device.start_log()
        first = backend.dirty
        assert first is not None
        page = memory.guest_addr // PAGE
        first[page // 8] |= 1 << page % 8

        def late(backend: FakeBackend, received: Received) -> bytes:
            first[page // 8] |= 2 << page % 8  # until it has answered it may use the old one
            return fakes.message(received.request, received.payload)

        backend.answers[fakes.SET_LOG_BASE] = late
        assert list(device.swap_log().runs()) == [(memory.guest_addr, 2 * PAGE)]
        assert not device.read_log()
        first.close()


@pytest.mark.parametrize("answer", [b"", bytes(8), bytes(200)])
def test_any_reply_to_set_log_base_is_taken(answer: bytes) -> None:
    with fake(answers={6: lambda _, received: fakes.message(received.request, answer)}) as (_, device, _, _):
        device.start_log()
        assert device.logging


def test_back_ends_that_cannot_log_are_unfit_and_it_says_why() -> None:
    with fake(protocol=fakes.ALL & ~fakes.BACKEND_REQ) as (backend, device, _, _):
        with pytest.raises(BackendUnfit, match="does not offer LOG_SHMFD"):
            device.start_log()
        assert not backend.log
    with (
        fake(features=FEATURES & ~fakes.LOG_ALL) as (_, device, _, _),
        pytest.raises(BackendUnfit, match="does not offer LOG_ALL"),
    ):
        device.start_log()


def test_a_back_end_that_refuses_to_log_leaves_none() -> None:
    with fake() as (backend, device, _, _):
        backend.answers[fakes.SET_FEATURES] = lambda _, received: fakes.u64(received.request, 1)
        with pytest.raises(BackendRefused, match="SET_FEATURES"):
            device.start_log()
        assert not device.logging
        with pytest.raises(SetupError, match="does not log"):
            device.read_log()
    with fake(answers={6: lambda *_: Hangup()}) as (_, device, _, _):
        with pytest.raises(Exception, match="closed the connection"):
            device.start_log()
        assert not device.logging


def test_a_log_outlives_stop_and_a_connection_and_is_told_before_the_rings_are_enabled() -> None:
    with fake() as (backend, device, memory, queues):
        device.start_log()
        device.stop()
        backend.log.clear()
        device.start(memory, queues[:1])
        order = [received.request for received in backend.log]
        assert backend.payloads(fakes.SET_FEATURES)[-1][3] & 4, "LOG_ALL"
        assert backend.payloads(fakes.SET_VRING_ADDR)[-1][4] == 1
        assert order.index(fakes.SET_VRING_KICK) < order.index(fakes.SET_LOG_BASE) < order.index(fakes.SET_VRING_ENABLE)
        log = device.take_log()
        assert isinstance(log, HostLog)
        assert not device.logging
        close(device, [])
        with FakeBackend(features=FEATURES, protocol=LOGGING) as other:
            later = HostDevice(other.give(), features=VERSION_1, protocol_features=MOVABLE)
            later.realize()
            later.start(memory, queues[:1], log=log)
            assert later.logging
            assert other.payloads(fakes.SET_LOG_BASE)
            later.close()


def test_what_our_back_end_writes_is_in_the_log_of_our_front_end(serve: Serve) -> None:
    device = HostDevice(serve(BlockDevice(MemoryDisk(1 << 20))), features=VERSION_1, protocol_features=MOVABLE)
    device.realize()
    memory, queues = memory_for()
    device.start(memory, queues)
    assert write_sector(memory, queues[0], 0, bytes(512)) == 0
    device.start_log()
    device.read_log()
    assert write_sector(memory, queues[0], 0, bytes(512)) == 0
    used = memory.guest_addr + queues[0].areas[2]
    dirty = device.read_log()
    assert used in dirty
    assert len(dirty) == 2, "the used ring, and the page of the status byte"
    assert write_sector(memory, queues[0], 0, bytes(512)) == 0
    assert pages_of(device.swap_log()) == pages_of(dirty)
    assert write_sector(memory, queues[0], 0, bytes(512)) == 0
    device.stop()
    assert pages_of(device.read_log()) == pages_of(dirty)
    device.start(memory, queues)
    assert write_sector(memory, queues[0], 0, bytes(512)) == 0
    assert pages_of(device.stop_log()) >= pages_of(dirty), "it goes on when the rings start again"
    assert write_sector(memory, queues[0], 0, bytes(512)) == 0
    with pytest.raises(SetupError, match="does not log"):
        device.read_log()
    close(device, queues)
