"""The client of disks for asyncio: the same requests, awaited."""

from __future__ import annotations

import asyncio
import os
import random

import pytest
from tests.blk_client.conftest import SIZE, WAIT_S
from tests.frontend.conftest import Serve
from tests.frontend.fakes import FakeBackend, Ring

import vhostuser
from vhostuser import (
    AsyncBlockClient,
    BlockDevice,
    ConfigChange,
    ConfigRefused,
    MemoryDisk,
    NullDisk,
    PeerGone,
    Read,
    RemoteRingError,
    RequestFailed,
    RequestRefused,
    SetupError,
    Transport,
    Write,
)
from vhostuser.disks.faulty import Faults, FaultyDisk
from vhostuser.virtio.blk import BlkFeature


def test_every_kind_of_request_is_awaited(disk: Transport) -> None:
    async def main() -> None:
        async with await vhostuser.connect_async(disk, queues=2) as client:
            data = os.urandom(3 << 20)
            await client.write(4096, data)
            assert await client.read(4096, len(data)) == data
            with await client.allocate(8192) as buffer:
                await client.readinto(4096, buffer)
                assert buffer.view == data[:8192]
                await client.write(0, [buffer[:4096]])
            await client.write_zeroes(0, 512)
            await client.discard(1 << 20, 4096)
            await client.flush()
            assert await client.read(0, 1024) == bytes(512) + data[512:1024]
            assert await client.get_id() == "from the test"
            await client.set_write_cache(False)
            assert not client.write_cache
            assert await client.read(0, 0) == b""
            assert (client.size, client.num_queues) == (SIZE, 2)
        with pytest.raises(SetupError, match="closed"):
            await client.read(0, 512)
        await client.close()

    asyncio.run(main())


def test_ten_thousand_requests_are_in_rings_of_four_back_ends_at_once_and_come_back_right(serve: Serve) -> None:
    slow = Faults(delay_read_s=0.3)
    devices = [BlockDevice(FaultyDisk(MemoryDisk(SIZE), slow)) for _ in range(4)]

    async def main() -> None:
        clients: list[AsyncBlockClient] = []
        for device in devices:
            clients.append(await vhostuser.connect_async(serve(device), queue_size=4096))
        places = [(number % 4, number // 4) for number in range(10_000)]
        random.Random(1).shuffle(places)
        writes = [clients[which].submit(Write(at * 512, _sector(which, at))) for which, at in places]
        await asyncio.gather(*writes)
        reads = [clients[which].submit(Read(at * 512, 512)) for which, at in places]
        in_rings = sum(client.outstanding for client in clients)
        assert in_rings == 10_000, "in rings, and not in Python"
        for (which, at), read in zip(places, reads, strict=True):
            assert await read == _sector(which, at)
        for client in clients:
            await client.close()

    asyncio.run(main())


def _sector(which: int, at: int) -> bytes:
    return (which << 16 | at).to_bytes(4, "little") * 128


def test_tasks_that_are_cancelled_leave_a_client_that_works(serve: Serve) -> None:
    device = BlockDevice(FaultyDisk(MemoryDisk(SIZE), Faults(delay_read_s=0.05)))

    async def main() -> None:
        async with await vhostuser.connect_async(serve(device), queue_size=8) as client:
            with await client.allocate(512) as buffer:
                tasks = [asyncio.create_task(client.readinto(0, buffer)) for _ in range(30)]
                await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert all(task.cancelled() for task in tasks)
            assert await client.read(0, 512) == bytes(512)

    asyncio.run(main())


def test_changes_of_the_configuration_are_awaited_and_heard_on_the_loop(serve: Serve) -> None:
    device = BlockDevice(NullDisk(SIZE))
    heard: list[tuple[ConfigChange, asyncio.AbstractEventLoop]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        client = await vhostuser.connect_async(
            serve(device), on_config_change=lambda change: heard.append((change, asyncio.get_running_loop()))
        )
        waiting = asyncio.create_task(client.wait_config_change())
        device.resize(2 * SIZE)
        change = await asyncio.wait_for(waiting, WAIT_S)
        assert heard == [(change, loop)]
        assert client.size == 2 * SIZE
        waiting = asyncio.create_task(client.wait_config_change())
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(SetupError, match="closed"):
            await waiting

    asyncio.run(main())


def test_errors_are_those_of_the_other_client(serve: Serve) -> None:
    device = BlockDevice(FaultyDisk(MemoryDisk(SIZE), Faults(error_read=1.0)))

    async def main() -> None:
        async with await vhostuser.connect_async(serve(device), features=int(BlkFeature.FLUSH)) as client:
            with pytest.raises(RequestFailed, match="IN at sector 0 failed with status IOERR"):
                await client.read(0, 512)
            with pytest.raises(RequestRefused, match="whole blocks"):
                await client.read(0, 100)
            with pytest.raises(ConfigRefused):
                await client.set_write_cache(True)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["lie", "silence", "hang up"])
def test_a_broken_disk_fails_all_that_is_awaited_and_leaves_the_others(how: str) -> None:
    def device(backend: FakeBackend, ring: Ring) -> None:
        if backend.take(ring) is None:
            return
        if how == "lie":
            backend.put(ring, 12345, 0)
            backend.call(ring)
        elif how == "hang up":
            backend.hang_up()

    async def main() -> None:
        with FakeBackend() as good, FakeBackend(device=device) as bad:
            other = await vhostuser.connect_async(good.give())
            client = await vhostuser.connect_async(bad.give(), request_timeout_s=0.1)
            results = await asyncio.gather(*(client.read(0, 512) for _ in range(300)), return_exceptions=True)
            kinds = {type(result) for result in results}
            assert kinds == {RemoteRingError if how == "lie" else PeerGone}
            assert not client.connected
            assert await other.read(0, 512) == bytes(512)
            with pytest.raises((PeerGone, RemoteRingError)):
                await client.wait_config_change()
            await client.close()
            await other.close()

    asyncio.run(main())
