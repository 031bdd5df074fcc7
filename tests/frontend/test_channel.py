"""The back-end channel, seen from the host: whatever comes over it, the device goes on."""

from __future__ import annotations

import os
import queue
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from tests.frontend import fakes
from tests.frontend.conftest import WAIT_S, Serve
from tests.frontend.fakes import FakeBackend, message

from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.frontend import HostDevice, SharedMemory, plain_queue, ring_bytes

CONFIG_CHANGE, IOTLB, SHMEM_MAP = 2, 1, 9
REQUEST, NEED_REPLY = 1, 9

Changes = queue.SimpleQueue[tuple[bytes, bytes]]


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    """One that has a channel and an IOMMU, and obeys in everything."""
    features = fakes.VERSION_1 | fakes.PROTOCOL | fakes.ACCESS_PLATFORM
    with FakeBackend(features=features, protocol=fakes.ALL) as made:
        yield made


@pytest.fixture
def device(backend: FakeBackend) -> Iterator[HostDevice]:
    made = HostDevice(backend.give(), features=fakes.VERSION_1 | fakes.ACCESS_PLATFORM)
    made.realize()
    yield made
    made.close()


def channel(backend: FakeBackend) -> socket.socket:
    assert backend.channel is not None
    backend.channel.settimeout(WAIT_S)
    return backend.channel


def ask(backend: FakeBackend, data: bytes) -> bytes:
    """Send a message over the channel and return what answers it."""
    sock = channel(backend)
    sock.sendall(data)
    return sock.recv(4096)


def watch(device: HostDevice) -> Changes:
    changes: Changes = queue.SimpleQueue()
    device.watch_config(60, lambda old, new: changes.put((old, new)))
    return changes


def test_a_change_of_the_configuration_is_told_with_old_and_new(serve: Serve) -> None:
    disk = BlockDevice(MemoryDisk(1 << 20))
    device = HostDevice(serve(disk))
    device.realize()
    changes = watch(device)
    memory = SharedMemory(ring_bytes(8), 0)
    ring = plain_queue(memory, 0, 8, features=0)
    device.start(memory, [ring])
    disk.resize(2 << 20)
    old, new = changes.get(timeout=WAIT_S)
    assert (struct.unpack_from("<Q", old), struct.unpack_from("<Q", new)) == ((2048,), (4096,))
    device.close()
    ring.close()


def test_a_change_is_acknowledged_before_the_configuration_is_read(backend: FakeBackend, device: HostDevice) -> None:
    """A back-end that waits for the acknowledgement cannot answer GET_CONFIG before it has it."""
    changes = watch(device)
    backend.space[0] = 7
    before = backend.requests.count(fakes.GET_CONFIG)
    answered = []

    def change() -> None:
        answered.append(ask(backend, message(CONFIG_CHANGE, b"", NEED_REPLY)))
        answered.append(backend.requests.count(fakes.GET_CONFIG))

    backend.run_there(change)
    old, new = changes.get(timeout=WAIT_S)
    assert (old[0], new[0]) == (0, 7)
    assert answered == [message(CONFIG_CHANGE, bytes(8)), before]


def test_news_of_a_configuration_that_did_not_change_are_no_news(backend: FakeBackend, device: HostDevice) -> None:
    changes = watch(device)
    ask(backend, message(CONFIG_CHANGE, b"", NEED_REPLY))
    backend.space[1] = 9
    ask(backend, message(CONFIG_CHANGE, b"", NEED_REPLY))
    assert changes.get(timeout=WAIT_S)[1][1] == 9
    assert changes.empty()


def test_an_error_in_a_listener_does_not_end_the_channel(backend: FakeBackend, device: HostDevice) -> None:
    def fail(old: bytes, new: bytes) -> None:
        raise ZeroDivisionError

    device.watch_config(60, fail)
    for value in (1, 2):
        backend.space[0] = value
        assert ask(backend, message(CONFIG_CHANGE, b"", NEED_REPLY)) == message(CONFIG_CHANGE, bytes(8))


@pytest.mark.parametrize(
    "data",
    [
        message(99, b"what?", NEED_REPLY),
        message(SHMEM_MAP, bytes(40), NEED_REPLY),
        message(IOTLB, struct.pack("=QQQBB6x", 0, 1, 0, 1, 4), NEED_REPLY),
        message(IOTLB, b"short", NEED_REPLY),
        message(CONFIG_CHANGE, b"too long", NEED_REPLY),
    ],
    ids=["unknown", "not negotiated", "access failed", "wrong size", "payload where none belongs"],
)
def test_what_is_not_done_here_is_refused_and_the_channel_stays_open(
    backend: FakeBackend, device: HostDevice, data: bytes
) -> None:
    number = struct.unpack_from("=I", data)[0]
    assert ask(backend, data) == message(number, struct.pack("=Q", 1))
    assert ask(backend, message(CONFIG_CHANGE, b"", NEED_REPLY)) == message(CONFIG_CHANGE, bytes(8))


def test_a_miss_in_the_arena_is_answered_by_a_translation_and_one_elsewhere_by_no(
    backend: FakeBackend, device: HostDevice
) -> None:
    memory = SharedMemory(ring_bytes(8), 4096)
    ring = plain_queue(memory, 0, 8, features=fakes.VERSION_1)
    device.start(memory, [ring])
    sent = len(backend.payloads(fakes.IOTLB_MSG))
    miss: Callable[[int], bytes] = lambda iova: message(  # noqa: E731
        IOTLB, struct.pack("=QQQBB6x", iova, 0, 0, 1, 1), NEED_REPLY
    )
    assert ask(backend, miss(memory.guest_addr + 100)) == message(IOTLB, bytes(8))
    assert len(backend.payloads(fakes.IOTLB_MSG)) == sent + 1
    for outside in (memory.guest_addr - 1, memory.guest_addr + memory.size, 0):
        assert ask(backend, miss(outside)) == message(IOTLB, struct.pack("=Q", 1))
    assert len(backend.payloads(fakes.IOTLB_MSG)) == sent + 1
    ring.close()


@pytest.mark.parametrize(
    "data",
    [message(CONFIG_CHANGE, b"", 2), message(CONFIG_CHANGE, b"", 5), message(1, size=5000), b"\xff" * 40],
    ids=["version", "a reply", "oversize", "noise"],
)
def test_noise_closes_the_channel_and_nothing_else(backend: FakeBackend, device: HostDevice, data: bytes) -> None:
    assert ask(backend, data) == b"", "the channel is closed"
    assert device.read_config(20, 4) == struct.pack("<I", 512)


def test_the_end_of_the_channel_in_the_middle_of_a_message_is_no_end_of_the_device(
    backend: FakeBackend, device: HostDevice
) -> None:
    channel(backend).sendall(b"\2\0\0")
    channel(backend).shutdown(socket.SHUT_WR)
    assert channel(backend).recv(100) == b""
    assert device.read_config(0, 8) == bytes(backend.space[:8])


def test_descriptors_that_come_over_the_channel_are_closed(backend: FakeBackend, device: HostDevice) -> None:
    read_end, write_end = os.pipe()
    socket.send_fds(channel(backend), [message(99, b"", NEED_REPLY)], [write_end] * 3)
    assert channel(backend).recv(100) == message(99, struct.pack("=Q", 1))
    os.close(write_end)
    assert os.read(read_end, 1) == b"", "nobody holds the other end any more"
    os.close(read_end)
