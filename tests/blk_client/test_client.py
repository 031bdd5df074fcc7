"""The client of disks over our own back-end: what is written is read, by every way there is."""

from __future__ import annotations

import os
import queue
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.blk_client.conftest import SIZE, WAIT_S
from tests.frontend.conftest import Serve

import vhostuser
from vhostuser import (
    BackendUnfit,
    BlockClient,
    BlockDevice,
    ConfigChange,
    ConfigRefused,
    Discard,
    FileDisk,
    Flush,
    MemoryDisk,
    NullDisk,
    Read,
    ReadInto,
    RequestFailed,
    RequestRefused,
    SetupError,
    Transport,
    Write,
    WriteZeroes,
)
from vhostuser.disks.faulty import Faults, FaultyDisk
from vhostuser.frontend.negotiated import USABLE
from vhostuser.protocol import ProtocolFeature
from vhostuser.virtio.blk import BlkFeature
from vhostuser.virtio.features import RingFeature


@pytest.fixture
def client(disk: Transport) -> Iterator[BlockClient]:
    with vhostuser.connect(disk) as made:
        yield made


def test_a_disk_tells_what_it_is(disk: Transport) -> None:
    with vhostuser.connect(disk, queues=3) as client:
        assert (client.size, client.block_size, client.num_queues) == (SIZE, 512, 3)
        assert client.config.capacity == SIZE // 512
        assert client.features & BlkFeature.WRITE_ZEROES
        assert ProtocolFeature.CONFIG in client.protocol_features
        assert client.get_id() == "from the test"
        assert client.connected
        assert not client.read_only
    assert not client.connected


def test_what_is_written_is_read_whatever_its_size_and_place(disk: Transport) -> None:
    draw = random.Random(5)
    image = bytearray(SIZE)
    with vhostuser.connect(disk, queues=4) as client:
        for _ in range(100):
            sectors = draw.choice([1, 3, 8, 100, 2048, 5000])
            offset = draw.randrange(SIZE // 512 - sectors + 1) * 512
            data = draw.randbytes(sectors * 512)
            client.write(offset, data)
            image[offset : offset + len(data)] = data
            again = draw.randrange(SIZE // 512 - sectors + 1) * 512
            assert client.read(again, len(data)) == image[again : again + len(data)]
        client.flush()
        assert client.read(0, SIZE) == image


def test_buffers_of_the_arena_are_not_copied_and_all_others_are(client: BlockClient) -> None:
    with client, client.allocate(3 << 20) as buffer:
        buffer.view[:] = data = os.urandom(3 << 20)
        client.write(0, buffer)
        buffer.view[:] = bytes(3 << 20)
        client.readinto(0, buffer)
        assert buffer.view == data
        client.write(512, [buffer[1024:2048], buffer[:512], buffer[1 << 20 :]])
        client.readinto(512, (buffer[4096:8192], buffer[:512]))
        assert buffer.view[4096:5120] == data[1024:2048]
        assert buffer.view[5120:5632] == data[:512]
        assert client.copied_bytes == 0
        client.write(0, bytes(1024))
        client.readinto(0, bytearray(512))
        client.read(0, 4096)
        assert client.copied_bytes == 1024 + 512 + 4096


def test_buffers_of_odd_sizes_are_one_request_all_the_same(client: BlockClient) -> None:
    data = os.urandom(4096)
    with client, client.allocate(4096) as buffer:
        buffer.view[:1000] = data[100:1100]
        client.write(0, [data[:100], buffer[:1000], memoryview(data)[1100:], b""])
        assert client.read(0, 4096) == data
        parts = [bytearray(1), buffer[10:1033], bytearray(3072)]
        client.readinto(0, parts)
        assert bytes(parts[0]) + bytes(buffer[10:1033].view) + bytes(parts[2]) == data


def test_zeroes_and_discards_go_where_they_were_meant(client: BlockClient) -> None:
    with client:
        client.write(0, b"\xaa" * (64 << 10))
        client.write_zeroes(4096, 8192)
        client.write_zeroes(16384, 512, unmap=True)
        assert client.read(0, 4096) == b"\xaa" * 4096
        assert client.read(4096, 8192) == bytes(8192)
        assert client.read(16384, 1024) == bytes(512) + b"\xaa" * 512
        client.discard(32768, 4096)
        assert client.read(32768, 4096) == bytes(4096), "a memory disk gives its pages back"
        client.discard(0, SIZE)


def test_nothing_to_do_is_done_at_once(client: BlockClient) -> None:
    with client:
        assert client.read(0, 0) == b""
        client.write(SIZE, b"")
        client.readinto(0, [])
        client.discard(512, 0)
        assert client.submit_all([]) == []


@pytest.mark.parametrize("size", [4, 16, 1024])
@pytest.mark.parametrize("ring", [0, RingFeature.INDIRECT_DESC, RingFeature.EVENT_IDX])
def test_rings_of_any_size_and_kind_carry_more_than_fits_into_them(disk: Transport, size: int, ring: int) -> None:
    features = int(BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | RingFeature.VERSION_1) | ring
    with vhostuser.connect(disk, queue_size=size, features=features) as client:
        writes = client.submit_all(Write(at * 512, at.to_bytes(4, "big") * 128) for at in range(300))
        assert not wait(writes, WAIT_S).not_done
        reads = client.submit_all(Read(at * 512, 512) for at in range(300))
        assert [read.result(WAIT_S) for read in reads] == [at.to_bytes(4, "big") * 128 for at in range(300)]


def test_futures_come_in_the_order_of_their_requests_and_of_every_kind(client: BlockClient) -> None:
    with client, client.allocate(512) as buffer:
        client.write(0, b"\1" * 512)
        futures = client.submit_all(
            [Read(0, 512), ReadInto(0, buffer), Flush(), Discard(4096, 4096), WriteZeroes(8192, 512)], queue=0
        )
        assert [future.result(WAIT_S) for future in futures] == [b"\1" * 512, None, None, None, None]
        assert buffer.view == b"\1" * 512
        with pytest.raises(SetupError, match="no queue 1"):
            client.submit(Flush(), queue=1)


def test_one_refused_request_keeps_the_whole_batch_back(client: BlockClient) -> None:
    with client, client.allocate(512) as buffer:
        with pytest.raises(RequestRefused):
            client.submit_all([ReadInto(0, buffer), Write(0, b"\1" * 512), Read(1, 512)])
        assert client.read(0, 512) == bytes(512)
        buffer.release()
        assert client.allocate(512).offset == buffer.offset, "no request holds it"


@pytest.mark.parametrize("per_thread", [False, True])
def test_threads_share_a_client(disk: Transport, per_thread: bool) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        draw = random.Random(number)
        start, length = number * (1 << 20), 1 << 20
        for _ in range(40):
            offset = start + draw.randrange(length // 4096) * 4096
            data = draw.randbytes(4096)
            client.write(offset, data)
            if client.read(offset, 4096) != data:
                wrong.append(offset)

    with vhostuser.connect(disk, queues=3, queue_size=4, per_thread=per_thread) as client:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not wrong


def test_a_thread_keeps_to_its_queue(serve: Serve) -> None:
    device = BlockDevice(NullDisk(SIZE), num_queues=2)
    with vhostuser.connect(serve(device), queues=2, per_thread=True) as client:
        for _ in range(6):
            client.read(0, 512)
        other = threading.Thread(target=client.read, args=(0, 512))
        other.start()
        other.join(WAIT_S)
    assert sorted(one["reads"] for one in device.statistics()) == [1, 6]


def test_requests_take_the_queues_in_turn(serve: Serve) -> None:
    device = BlockDevice(NullDisk(SIZE), num_queues=2)
    with vhostuser.connect(serve(device), queues=2) as client:
        for _ in range(6):
            client.read(0, 512)
    assert [one["reads"] for one in device.statistics()] == [3, 3]


def test_a_callback_may_submit_what_comes_next(client: BlockClient) -> None:
    seen: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    rounds = count()

    def then(future: Future[Any]) -> None:
        seen.put(future.result())
        if next(rounds) < 4:
            client.submit(Read(0, 512)).add_done_callback(then)

    with client:
        client.submit(Read(0, 512)).add_done_callback(then)
        assert [seen.get(timeout=WAIT_S) for _ in range(5)] == [bytes(512)] * 5


def test_a_callback_cannot_close_its_client_and_says_so(client: BlockClient) -> None:
    said: queue.SimpleQueue[Exception] = queue.SimpleQueue()

    def close(future: Future[Any]) -> None:
        try:
            client.close()
        except SetupError as error:
            said.put(error)

    with client:
        client.submit(Read(0, 512)).add_done_callback(close)
        assert "cannot close" in str(said.get(timeout=WAIT_S))


def test_a_larger_disk_is_told_and_used(serve: Serve) -> None:
    device = BlockDevice(MemoryDisk(SIZE))
    heard: queue.SimpleQueue[ConfigChange] = queue.SimpleQueue()
    with vhostuser.connect(serve(device), on_config_change=heard.put) as client:
        with pytest.raises(RequestRefused, match="do not lie in"):
            client.write(SIZE, bytes(512))
        device.resize(2 * SIZE)
        change = client.wait_config_change(WAIT_S)
        assert change is not None
        assert (change.old.capacity, change.new.capacity) == (SIZE // 512, SIZE // 256)
        assert heard.get(timeout=WAIT_S) == change
        assert client.size == 2 * SIZE
        client.write(SIZE, b"\7" * 512)
        assert client.read(SIZE, 512) == b"\7" * 512
        assert client.wait_config_change(0) is None


def test_a_back_end_without_a_channel_is_asked_again(serve: Serve) -> None:
    device = BlockDevice(MemoryDisk(SIZE))
    without = USABLE & ~ProtocolFeature.BACKEND_REQ
    with vhostuser.connect(serve(device), protocol_features=without) as client:
        device.resize(2 * SIZE)
        assert client.size == SIZE
        client.refresh()
        assert client.size == 2 * SIZE


@pytest.mark.parametrize(
    "without", [ProtocolFeature.REPLY_ACK, ProtocolFeature.MQ, ProtocolFeature.CONFIGURE_MEM_SLOTS, USABLE]
)
def test_a_disk_is_driven_without_what_protocols_add(serve: Serve, without: ProtocolFeature) -> None:
    device = BlockDevice(MemoryDisk(SIZE))
    with vhostuser.connect(serve(device), protocol_features=USABLE & ~without) as client:
        client.write(0, b"\3" * 512)
        assert client.read(0, 512) == b"\3" * 512
        client.set_write_cache(False)
        assert not client.write_cache


def test_the_write_cache_is_switched_and_that_is_no_news(client: BlockClient) -> None:
    with client:
        assert client.write_cache
        client.set_write_cache(False)
        assert not client.write_cache
        client.set_write_cache(True)
        assert client.write_cache
        client.refresh()
        assert client.wait_config_change(0) is None


def test_a_disk_whose_cache_cannot_be_switched_says_so(disk: Transport) -> None:
    features = int(BlkFeature.FLUSH | RingFeature.VERSION_1)
    with vhostuser.connect(disk, features=features) as client:
        assert client.write_cache
        with pytest.raises(ConfigRefused, match="does not offer"):
            client.set_write_cache(True)


def test_a_read_only_disk_refuses_before_anything_is_sent(serve: Serve) -> None:
    device = BlockDevice(MemoryDisk(SIZE, read_only=True))
    with vhostuser.connect(serve(device)) as client:
        assert client.read_only
        assert client.read(0, 512) == bytes(512)
        with pytest.raises(RequestRefused, match="read-only"):
            client.write(0, bytes(512))
        with pytest.raises(RequestRefused, match="does not offer to discard"):
            client.discard(0, 512)
        with pytest.raises(RequestRefused, match="does not offer to write zeroes"):
            client.write_zeroes(0, 512)
    assert device.statistics()[0]["errors"] == 0


def test_a_buffer_that_cannot_be_read_into_is_refused(client: BlockClient) -> None:
    with client:
        with pytest.raises(RequestRefused, match="cannot be written"):
            client.readinto(0, memoryview(bytes(512)))
        buffer = client.allocate(512)
        buffer.release()
        with pytest.raises(RequestRefused, match="released"):
            client.readinto(0, buffer)


def test_a_buffer_of_another_connection_is_refused(serve: Serve) -> None:
    with (
        vhostuser.connect(serve(BlockDevice(MemoryDisk(SIZE)))) as one,
        vhostuser.connect(serve(BlockDevice(MemoryDisk(SIZE)))) as other,
        one.allocate(512) as buffer,
        pytest.raises(RequestRefused, match="another connection"),
    ):
        other.write(0, buffer)


def test_an_arena_that_is_full_says_so(disk: Transport) -> None:
    with vhostuser.connect(disk, memory=1 << 20) as client, client.allocate(1 << 20):
        with pytest.raises(SetupError, match="no 4096 bytes in one piece are left"):
            client.allocate(4096)
        client.write(0, bytes(1 << 20))


def test_little_room_for_copies_is_room_enough(disk: Transport) -> None:
    with vhostuser.connect(disk, queues=2, copy_memory=(1 << 20) + 777) as client:
        data = os.urandom(5 << 20)
        client.write(0, data)
        assert client.read(0, len(data)) == data


def test_a_failed_request_is_an_os_error_with_its_evidence(serve: Serve) -> None:
    device = BlockDevice(FaultyDisk(MemoryDisk(SIZE), Faults(error_write=1.0)))
    with vhostuser.connect(serve(device)) as client:
        with pytest.raises(RequestFailed, match="OUT at sector 8 failed with status IOERR") as caught:
            client.write(4096, bytes(512))
        assert isinstance(caught.value, OSError)
        assert (caught.value.errno, caught.value.status, caught.value.kind, caught.value.sector) == (5, 1, 1, 8)
        with pytest.raises(RequestFailed):
            client.write(0, bytes(5 << 20))
        assert client.read(0, 512) == bytes(512), "the client goes on"


def test_options_that_make_no_sense_are_refused(disk: Transport) -> None:
    for wrong in ({"queue_size": 100}, {"queue_size": 2}, {"queues": 0}, {"queues": 257}, {"timeout_s": 0}):
        with pytest.raises(SetupError):
            vhostuser.connect("/nowhere", **wrong)  # type: ignore[arg-type]
    with pytest.raises(BackendUnfit, match="it has 4 queues and 5 were asked for"):
        vhostuser.connect(disk, queues=5)


def test_a_closed_client_waits_for_what_is_under_way_and_takes_no_more(serve: Serve) -> None:
    device = BlockDevice(FaultyDisk(MemoryDisk(SIZE), Faults(delay_read_s=0.05)))
    client = vhostuser.connect(serve(device), queue_size=4)
    futures = client.submit_all(Read(at * 512, 512) for at in range(10))
    client.close()
    client.close()
    assert all(future.done() for future in futures)
    assert all(future.result() == bytes(512) for future in futures)
    with pytest.raises(SetupError, match="closed"):
        client.read(0, 512)
    assert client.wait_config_change() is None


def test_a_file_is_reached_through_a_real_socket_and_engine(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(1 << 20))
    path = str(tmp_path / "disk.sock")
    with FileDisk(str(image)) as disk:
        device = BlockDevice(disk)
        with vhostuser.Server(device, vhostuser.listen(path)):
            with vhostuser.connect(path) as client:
                assert client.read(0, 1 << 20) == image.read_bytes()
                client.write(4096, b"new" * 2048 + bytes(2048))
                client.flush()
            with vhostuser.connect(path) as client:
                assert client.read(4096, client.block_size)[:3] == b"new"
        device.close()
    assert image.read_bytes()[4096:4099] == b"new"
    del device
