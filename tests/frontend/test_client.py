"""`HostDevice`: the life of a device, seen from the host, over back-ends with much and with little."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from pathlib import Path

import pytest
from tests.frontend import fakes
from tests.frontend.conftest import WAIT_S, Serve
from tests.frontend.fakes import FakeBackend

from vhostuser._native import DriverRing
from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.errors import (
    BackendRefused,
    BackendUnfit,
    ConfigRefused,
    OperatorError,
    PeerGone,
    SetupError,
    UsageError,
)
from vhostuser.frontend import MOVABLE, HostDevice, HostQueue, Life, SharedMemory, plain_queue, ring_bytes
from vhostuser.protocol import ProtocolFeature
from vhostuser.transport import Transport, listen

VERSION_1 = 1 << 32
SIZE = 16


def memory_for(queues: int = 1, base: int = 0) -> tuple[SharedMemory, list[HostQueue[DriverRing]]]:
    memory = SharedMemory(queues * ring_bytes(SIZE), 1 << 16)
    return memory, [plain_queue(memory, index, SIZE, features=VERSION_1, base=base) for index in range(queues)]


def close(device: HostDevice, queues: list[HostQueue[DriverRing]]) -> None:
    device.close()
    for queue in queues:
        queue.close()


def write_sector(memory: SharedMemory, queue: HostQueue[DriverRing], sector: int, data: bytes) -> int:
    """One request, and its status."""
    with memory.allocate(4096) as buffer:
        head = struct.pack("<IIQ", 1, 0, sector) + data
        buffer.view[: len(head)] = head
        buffer.view[4095] = 0xFF
        start = buffer.guest_addr
        queue.driver.add([(start, 16), (start + 16, len(data))], [(start + 4095, 1)])
        if queue.driver.publish():
            queue.notify()
        while not queue.driver.reap():
            if not queue.driver.enable_calls():
                assert select.select([queue.call], [], [], WAIT_S)[0], "the ring is not served"
                queue.called()
        return buffer.view[4095]


def test_a_device_lives_through_start_stop_reset_and_start_again(serve: Serve) -> None:
    device = HostDevice(serve(BlockDevice(MemoryDisk(1 << 20), num_queues=2)), features=VERSION_1)
    device.realize()
    assert device.max_queues == 2
    assert device.features == VERSION_1
    memory, queues = memory_for(2)
    for turn in range(3):
        device.start(memory, queues)
        assert device.life is Life.STARTED
        for queue in queues:
            assert write_sector(memory, queue, 0, bytes(512)) == 0
        device.stop()
        assert [queue.base for queue in queues] == [turn + 1, turn + 1], "the rings go on where they stopped"
    device.reset()
    for queue in queues:
        queue.close()
    memory, queues = memory_for(2)
    device.start(memory, queues)
    assert write_sector(memory, queues[1], 1, bytes(512)) == 0, "in other memory, too"
    device.reset()
    assert queues[1].base == 1
    close(device, queues)
    assert device.life is Life.CLOSED


def test_a_step_of_the_life_that_is_not_due_is_refused(serve: Serve) -> None:
    with HostDevice(serve(BlockDevice(MemoryDisk(1 << 20)))) as device:
        memory, queues = memory_for()
        with pytest.raises(SetupError, match="is connected, not realized"):
            device.start(memory, queues)
        device.realize()
        with pytest.raises(SetupError, match="is realized, not connected"):
            device.realize()
        with pytest.raises(SetupError, match="is realized, not started"):
            device.stop()
        close(device, queues)
        with pytest.raises(SetupError, match="is closed"):
            device.reset()


def test_the_order_of_messages_is_that_of_qemu() -> None:
    with FakeBackend(protocol=fakes.ALL) as backend:
        device = HostDevice(backend.give(), features=VERSION_1)
        device.realize()
        realized = backend.requests
        memory, queues = memory_for()
        device.start(memory, queues)
        started = backend.requests[len(realized) :]
        device.stop()
        stopped = backend.requests[len(realized) + len(started) :]
        device.reset()
        close(device, queues)
    assert realized == [1, 15, 16, 17, 36, 21, 3, 1]
    assert started == [39, 2, 39, 40, 37, 8, 10, 9, 13, 14, 12, 18, 39]
    assert stopped == [18, 11]
    assert backend.requests[-2:] == [39, 34]
    assert backend.payloads(fakes.SET_STATUS) == [struct.pack("=Q", status) for status in (3, 11, 15, 0)]
    assert backend.acked == VERSION_1 | fakes.PROTOCOL
    unasked = {received.request for received in backend.log if not received.flags & 8}
    assert unasked == {1, 15, 16, 17, 36, 40, 11}, "all but what has a reply of its own is acknowledged"


def test_a_back_end_without_any_extra_is_driven_and_asked_for_nothing_it_has_not() -> None:
    with FakeBackend(protocol=0) as backend:
        device = HostDevice(backend.give(), features=VERSION_1)
        device.realize()
        assert device.max_queues == 1
        assert device.max_mem_slots is None
        memory, queues = memory_for()
        device.start(memory, queues)
        assert write_sector(memory, queues[0], 3, b"x" * 512) == 0
        device.reset()
        close(device, queues)
        assert bytes(backend.disk[1536:1540]) == b"xxxx"
    assert backend.requests == [1, 15, 16, 3, 1, 2, 5, 1, 8, 10, 9, 13, 14, 12, 18, 1, 18, 1, 11, 1]
    assert not any(received.flags & 8 for received in backend.log), "acknowledgements are not negotiated"


def test_a_back_end_from_before_protocol_features_has_its_rings_enabled_at_once() -> None:
    with FakeBackend(features=VERSION_1) as backend:
        device = HostDevice(backend.give(), features=VERSION_1)
        device.realize()
        memory, queues = memory_for()
        device.start(memory, queues)
        assert write_sector(memory, queues[0], 0, bytes(512)) == 0
        device.stop()
        close(device, queues)
    assert not {15, 16, 18} & set(backend.requests)


def test_a_back_end_that_takes_no_memory_slot_gets_a_table() -> None:
    with FakeBackend(slots=0) as backend:
        device = HostDevice(backend.give(), features=VERSION_1)
        device.realize()
        memory, queues = memory_for()
        device.start(memory, queues)
        close(device, queues)
    assert fakes.SET_MEM_TABLE in backend.requests
    assert fakes.ADD_MEM_REG not in backend.requests


def test_memory_is_told_of_once_and_other_memory_takes_its_place() -> None:
    with FakeBackend() as backend:
        device = HostDevice(backend.give(), features=VERSION_1)
        device.realize()
        first, queues = memory_for()
        for _ in range(2):
            device.start(first, queues)
            device.stop()
        second, more = memory_for()
        device.start(second, more)
        assert write_sector(second, more[0], 0, bytes(512)) == 0
        device.stop()
        close(device, queues + more)
    kinds = (fakes.ADD_MEM_REG, fakes.REM_MEM_REG)
    assert [request for request in backend.requests if request in kinds] == [37, 38, 37]


def test_addresses_behind_an_iommu_are_the_guest_s_and_are_translated_before_a_ring_starts() -> None:
    features = VERSION_1 | fakes.ACCESS_PLATFORM | fakes.PROTOCOL
    with FakeBackend(features=features, protocol=fakes.ALL) as backend:
        device = HostDevice(backend.give(), features=VERSION_1 | fakes.ACCESS_PLATFORM)
        device.realize()
        memory, queues = memory_for()
        device.start(memory, queues)
        close(device, queues)
    requests = backend.requests
    assert requests.index(fakes.ADD_MEM_REG) < requests.index(fakes.IOTLB_MSG) < requests.index(fakes.SET_VRING_KICK)
    (update,) = backend.payloads(fakes.IOTLB_MSG)
    assert struct.unpack_from("=QQQBB", update) == (memory.guest_addr, memory.size, memory.user_addr, 3, 2)
    (addr,) = backend.payloads(fakes.SET_VRING_ADDR)
    assert struct.unpack_from("=Q", addr, 8)[0] == memory.guest_addr + queues[0].areas[0]


def test_an_iommu_is_left_alone_where_misses_cannot_be_told() -> None:
    with FakeBackend(features=VERSION_1 | fakes.ACCESS_PLATFORM | fakes.PROTOCOL) as backend:
        device = HostDevice(backend.give(), features=VERSION_1 | fakes.ACCESS_PLATFORM)
        device.realize()
        assert device.features == VERSION_1
        device.close()


def test_what_is_required_and_missing_is_named() -> None:
    with FakeBackend(protocol=fakes.MQ) as backend:
        device = HostDevice(backend.give(), require=ProtocolFeature.CONFIG | ProtocolFeature.STATUS)
        with pytest.raises(BackendUnfit, match="does not offer protocol feature CONFIG STATUS"):
            device.realize()
        device.close()


def test_a_back_end_that_does_not_keep_features_ok_is_unfit() -> None:
    forgetful = {fakes.GET_STATUS: lambda backend, received: fakes.u64(fakes.GET_STATUS, 3)}
    with FakeBackend(answers=forgetful) as backend:
        device = HostDevice(backend.give(), features=VERSION_1)
        device.realize()
        memory, queues = memory_for()
        with pytest.raises(BackendUnfit, match="does not accept these of the features it offered: VERSION_1"):
            device.start(memory, queues)
        close(device, queues)


def test_a_back_end_without_queues_is_unfit() -> None:
    with FakeBackend(queues=0) as backend:
        device = HostDevice(backend.give())
        with pytest.raises(BackendUnfit, match="has no queues"):
            device.realize()
        device.close()


@pytest.mark.parametrize("request_", [37, 8, 9, 12, 18])
def test_a_refusal_names_the_message_and_its_code(request_: int) -> None:
    with FakeBackend(answers={request_: lambda backend, received: fakes.u64(request_, 0x16)}) as backend:
        device = HostDevice(backend.give(), features=VERSION_1)
        device.realize()
        memory, queues = memory_for()
        with pytest.raises(BackendRefused, match=r"refused \w+ with code 0x16") as caught:
            device.start(memory, queues)
        assert caught.value.code == 0x16
        close(device, queues)


def test_the_configuration_is_read_and_written_at_any_place_with_any_flags() -> None:
    with FakeBackend() as backend:
        device = HostDevice(backend.give())
        device.realize()
        assert device.read_config(20, 4) == struct.pack("<I", 512)
        assert device.read_config(50, 100, flags=1) == bytes(backend.space[50:]).ljust(100, b"\0")
        device.write_config(32, b"\1")
        device.write_config(0, b"\2", flags=1)
        assert (backend.space[32], backend.space[0]) == (1, 2)
        flags = [struct.unpack_from("=III", payload) for payload in backend.payloads(fakes.SET_CONFIG)]
        assert flags == [(32, 1, 0), (0, 1, 1)]
        device.close()


@pytest.mark.parametrize("form", [b"", struct.pack("=III", 0, 0, 0)])
def test_both_dialects_of_a_refused_get_config_leave_the_connection_good(form: bytes) -> None:
    answers = {fakes.GET_CONFIG: lambda backend, received: fakes.message(fakes.GET_CONFIG, form)}
    with FakeBackend(answers=answers) as backend:
        device = HostDevice(backend.give())
        device.realize()
        with pytest.raises(BackendRefused, match="GET_CONFIG of 60 bytes at 0"):
            device.read_config(0, 60)
        assert device.dialogue.number(1) == backend.features
        device.close()


def test_a_refused_set_config_is_told_as_such(serve: Serve) -> None:
    device = HostDevice(serve(BlockDevice(MemoryDisk(1 << 20))))
    device.realize()
    with pytest.raises(ConfigRefused, match="refused 1 bytes at 0"):
        device.write_config(0, b"\1")
    device.close()


def test_the_front_end_may_be_the_server(tmp_path: Path) -> None:
    path = str(tmp_path / "front.sock")
    made: list[HostDevice] = []
    waiting = threading.Thread(target=lambda: made.append(HostDevice(path, listen=True)))
    waiting.start()
    with socket.socket(socket.AF_UNIX) as sock:
        while sock.connect_ex(path):
            os.sched_yield()
        waiting.join(WAIT_S)
        (device,) = made
        assert device.name == path
        assert not Path(path).exists(), "it listens for one back-end and no longer"
    with pytest.raises(PeerGone, match="closed the connection"):
        device.realize()
    device.close()


def test_nobody_there_or_nobody_coming_is_said_within_the_time_limit(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="there is no such socket"):
        HostDevice(str(tmp_path / "none"))
    with pytest.raises(PeerGone, match=r"no back-end connected to .* within 0\.05 s"):
        HostDevice(str(tmp_path / "none"), listen=True, timeout_s=0.05)
    with pytest.raises(UsageError, match="it is not a socket"), open(os.devnull) as null:
        HostDevice(null.fileno())


def test_an_inherited_socket_that_listens_waits_for_the_back_end(tmp_path: Path) -> None:
    path = str(tmp_path / "inherited.sock")
    with listen(path) as listener, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        with HostDevice(os.dup(listener.fileno())) as device:
            assert device.life is Life.CONNECTED


def test_a_ring_has_a_power_of_two_of_descriptors() -> None:
    memory = SharedMemory(1 << 16, 0)
    for size in (0, 3, 65536):
        with pytest.raises(SetupError, match="power of two"):
            plain_queue(memory, 0, size, features=0)


def test_a_transport_can_be_handed_over(serve: Serve) -> None:
    transport = serve(BlockDevice(MemoryDisk(1 << 20)))
    assert isinstance(transport, Transport)
    with HostDevice(transport) as device:
        assert device.name.startswith("file descriptor")


def asleep(backend: FakeBackend, ring: fakes.Ring) -> None:
    """A device that takes nothing."""


def leaving(backend: FakeBackend, received: fakes.Received) -> bytes:
    """An answer to GET_VRING_BASE that counts two requests as fetched which are not answered."""
    ring = backend.rings[0]
    ring.base += 2
    answer = backend.polite(received)
    assert isinstance(answer, bytes)
    return answer


def test_a_stop_that_may_leave_requests_keeps_the_region_for_the_next_start() -> None:
    tracking = fakes.ALL & ~fakes.BACKEND_REQ | fakes.INFLIGHT
    for request, extra in ((fakes.GET_VRING_BASE, 0), (45, 1 << 23)):
        protocol = tracking | fakes.BASE_INFLIGHT | extra
        with FakeBackend(protocol=protocol, answers={request: leaving}, device=asleep) as backend:
            wanted = MOVABLE | ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN
            device = HostDevice(backend.give(), features=VERSION_1, protocol_features=wanted)
            device.realize()
            memory, queues = memory_for()
            device.start(memory, queues)
            assert device.stop(leave=True) == 2
            assert queues[0].base == 2
            assert device.inflight is not None
            device.start(memory, queues)
            assert backend.requests.count(fakes.GET_INFLIGHT_FD) == 1, "it goes on with the same region"
            assert backend.payloads(fakes.SET_VRING_BASE)[-1] == struct.pack("=II", 0, 2)
            device.stop()
            region = device.take_inflight()
            assert region is not None
            with FakeBackend(protocol=tracking, device=asleep) as other:
                later = HostDevice(other.give(), features=VERSION_1, protocol_features=MOVABLE)
                later.realize()
                later.start(memory, queues, inflight=region)
                assert other.region_file == backend.region_file
                assert other.payloads(fakes.SET_VRING_BASE) == [struct.pack("=II", 0, queues[0].base)]
                later.close()
            close(device, queues)


def test_rings_are_not_stopped_with_requests_left_where_the_back_end_does_not_know_how() -> None:
    protocol = fakes.ALL & ~fakes.BACKEND_REQ | fakes.INFLIGHT
    with FakeBackend(protocol=protocol) as backend:
        device = HostDevice(backend.give(), features=VERSION_1, protocol_features=MOVABLE)
        device.realize()
        memory, queues = memory_for()
        device.start(memory, queues)
        with pytest.raises(SetupError, match="GET_VRING_BASE_INFLIGHT was not negotiated"):
            device.stop(leave=True)
        assert device.stop() == 0
        assert device.inflight is None
        close(device, queues)
