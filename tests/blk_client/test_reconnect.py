"""Back-ends that go and come again and know nothing of what was in flight: calls fail once, then there is a new
connection with new memory. Where it is tracked, it outlives them: see `test_comeback`."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest
from tests.blk_client.conftest import SIZE, WAIT_S

import vhostuser
from vhostuser import Backoff, BlockDevice, MemoryDisk, PeerGone, Read, RequestRefused, Server, VhostUserError, listen
from vhostuser.disks.faulty import Faults, FaultyDisk
from vhostuser.frontend import USABLE

QUICK = Backoff(first_s=0.001, most_s=0.01, give_up_s=WAIT_S)


class Host:
    """A back-end that can be ended and begun again at the same path."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.server: Server | None = None
        self.device: BlockDevice | None = None

    def begin(self, size: int = SIZE, *, slow: bool = False) -> None:
        disk = MemoryDisk(size)
        self.device = BlockDevice(FaultyDisk(disk, Faults(delay_read_s=0.1)) if slow else disk)
        self.server = Server(self.device, listen(self.path))
        self.server.start()

    def end(self) -> None:
        assert self.server is not None
        assert self.device is not None
        self.server.stop()
        assert self.server.join(WAIT_S)
        self.device.close()
        self.server = self.device = None
        gc.collect()


@pytest.fixture
def host(nothing_leaks: None, tmp_path: Path) -> Host:
    return Host(tmp_path / "disk.sock")


def test_calls_go_on_after_the_back_end_came_again(host: Host) -> None:
    host.begin()
    with vhostuser.connect(host.path, reconnect=QUICK, protocol_features=USABLE) as client:
        client.write(0, b"\1" * 512)
        old = client.allocate(512)
        copied = client.copied_bytes
        host.end()
        host.begin(2 * SIZE)
        change = client.wait_config_change(WAIT_S)
        assert change is not None
        assert change.new.capacity == 2 * SIZE // 512
        assert client.read(0, 512) == bytes(512), "it is another disk"
        assert client.size == 2 * SIZE
        assert client.copied_bytes == copied + 512
        with pytest.raises(RequestRefused, match="another connection, or to one that is over"):
            client.write(0, old)
        old.release()
    host.end()


def test_a_call_waits_for_the_new_connection(host: Host) -> None:
    host.begin()
    with vhostuser.connect(host.path, reconnect=QUICK, protocol_features=USABLE) as client:
        for _ in range(5):
            host.end()
            host.begin()
            try:
                assert client.read(0, 512) == bytes(512)
            except PeerGone:  # it was begun on the old connection
                assert client.read(0, 512) == bytes(512)
    host.end()


def test_a_client_that_is_closed_while_it_reconnects_gives_up_at_once(host: Host) -> None:
    host.begin()
    client = vhostuser.connect(
        host.path, reconnect=Backoff(first_s=1000, most_s=1000, give_up_s=1000), protocol_features=USABLE
    )
    host.end()
    client.close()


def test_when_nobody_comes_again_every_call_says_so(host: Host) -> None:
    host.begin()
    with vhostuser.connect(
        host.path, reconnect=Backoff(first_s=0.001, give_up_s=0.02), protocol_features=USABLE
    ) as client:
        client.write(0, bytes(512))
        host.end()
        with pytest.raises(VhostUserError):
            client.wait_config_change(WAIT_S)
        assert client.copied_bytes == 512
        with pytest.raises(PeerGone, match="no such socket"):
            client.read(0, 512)


def test_without_reconnection_the_first_end_is_the_last(host: Host) -> None:
    host.begin()
    with vhostuser.connect(host.path) as client:
        host.end()
        with pytest.raises(PeerGone, match="closed the connection"):
            client.wait_config_change(WAIT_S)
        host.begin()
        with pytest.raises(PeerGone, match="closed the connection"):
            client.read(0, 512)
    host.end()


def test_an_asyncio_client_reconnects_too(host: Host) -> None:
    async def main() -> None:
        async with await vhostuser.connect_async(host.path, reconnect=QUICK, protocol_features=USABLE) as client:
            await asyncio.to_thread(host.end)
            host.begin(2 * SIZE)
            change = await asyncio.wait_for(client.wait_config_change(), WAIT_S)
            assert change.new.capacity == 2 * SIZE // 512
            assert await client.read(0, 512) == bytes(512)
            assert client.connected

    host.begin()
    asyncio.run(main())
    host.end()


def test_an_asyncio_client_that_is_given_up_says_so(host: Host) -> None:
    async def main() -> None:
        backoff = Backoff(first_s=0.001, give_up_s=0.02)
        async with await vhostuser.connect_async(host.path, reconnect=backoff, protocol_features=USABLE) as client:
            await asyncio.to_thread(host.end)
            with pytest.raises(PeerGone, match="no such socket"):
                await asyncio.wait_for(client.wait_config_change(), WAIT_S)
            with pytest.raises(PeerGone, match="no such socket"):
                await client.read(0, 512)
            with pytest.raises(PeerGone):
                client.submit(Read(0, 512))

    host.begin()
    asyncio.run(main())
