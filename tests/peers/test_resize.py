"""A disk that changes its size while requests run: the client hears of it, sees the new size, and uses it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from tests.guest.processes import Deadline
from tests.peers.conftest import SIZE, Serve

import vhostuser
from vhostuser.blk.client import BlockClient
from vhostuser.blk.requests import Read, Write
from vhostuser.errors import RequestRefused
from vhostuser.frontend import USABLE
from vhostuser.protocol import ProtocolFeature

LIMIT_S: Final = 20.0
interop: Final = pytest.mark.interop
TELLING: Final = ["ours", *(pytest.param(name, marks=interop) for name in ("qsd-10.0", "qsd-11.1"))]


@contextmanager
def busy(disk: BlockClient) -> Iterator[list[int]]:
    """Verified writes and reads in the first MiB, on a thread, for as long as the block lasts; yields their count."""
    stop, count, failures = threading.Event(), [0], list[BaseException]()

    def run() -> None:
        try:
            while not stop.is_set():
                blocks = [os.urandom(4096) for _ in range(32)]
                for future in disk.submit_all(Write(8192 * at, block) for at, block in enumerate(blocks)):
                    future.result(LIMIT_S)
                answers = disk.submit_all(Read(8192 * at, 4096) for at in range(len(blocks)))
                assert [future.result(LIMIT_S) for future in answers] == blocks
                count[0] += 2 * len(blocks)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("name", TELLING)
def test_a_resize_is_heard_of_while_requests_run_and_the_new_room_is_used(name: str, serve: Serve, image: Path) -> None:
    backend = serve(name, image, queues=2)
    heard: list[vhostuser.ConfigChange] = []
    with vhostuser.connect(backend.socket, queues=2, on_config_change=heard.append) as disk, busy(disk) as count:
        for size in (SIZE * 2, SIZE * 2 + 512 * 8, SIZE * 3):
            before = disk.size
            with pytest.raises(RequestRefused):
                disk.read(size - 512, 512)
            backend.resize(size)
            change = disk.wait_config_change(Deadline(LIMIT_S).left_s)
            assert change is not None
            assert (change.old.capacity, change.new.capacity) == (before // 512, size // 512)
            assert disk.size == size
            assert disk.config.capacity == size // 512
            mark = os.urandom(4096)
            disk.write(size - 4096, mark)
            assert disk.read(size - 4096, 4096) == mark
        seen = count[0]
        deadline = Deadline(LIMIT_S)
        while count[0] == seen:  # the load goes on
            assert deadline.left_s
    assert heard
    assert heard[-1].new.capacity == SIZE * 3 // 512
    backend.stop()
    assert image.stat().st_size == SIZE * 3
    assert image.read_bytes()[-4096:] == mark


def test_a_shrunken_disk_refuses_what_lies_behind_its_new_end(serve: Serve, image: Path) -> None:
    backend = serve("ours", image)
    with vhostuser.connect(backend.socket) as disk, busy(disk):
        backend.resize(SIZE // 2)
        assert disk.wait_config_change(Deadline(LIMIT_S).left_s) is not None
        with pytest.raises(RequestRefused):
            disk.read(SIZE // 2, 512)
        disk.read(SIZE // 2 - 512, 512)


@interop
def test_the_storage_daemon_of_qemu_7_2_keeps_its_configuration_when_its_disk_grows(serve: Serve, image: Path) -> None:
    backend = serve("qsd-7.2", image)
    with vhostuser.connect(backend.socket) as disk, busy(disk):
        backend.resize(SIZE * 2)
        assert image.stat().st_size == SIZE * 2
        disk.refresh()
        assert disk.wait_config_change(0) is None
        assert disk.size == SIZE
    with vhostuser.connect(backend.socket) as disk:
        assert disk.size == SIZE


def test_a_client_that_cannot_be_told_asks_for_the_new_size(serve: Serve, image: Path) -> None:
    backend = serve("ours", image)
    deaf = USABLE & ~ProtocolFeature.BACKEND_REQ
    with vhostuser.connect(backend.socket, protocol_features=deaf) as disk, busy(disk):
        backend.resize(SIZE * 2)
        assert disk.size == SIZE
        disk.refresh()
        change = disk.wait_config_change(0)
        assert change is not None
        assert disk.size == SIZE * 2
        disk.write(SIZE * 2 - 512, b"\x72" * 512)
        assert disk.read(SIZE * 2 - 512, 512) == b"\x72" * 512


@pytest.mark.parametrize("name", TELLING)
def test_a_task_awaits_the_change_of_size(name: str, serve: Serve, image: Path) -> None:
    backend = serve(name, image)

    async def scenario() -> None:
        async with await vhostuser.connect_async(backend.socket) as disk:
            waiting = asyncio.create_task(disk.wait_config_change())
            await asyncio.to_thread(backend.resize, SIZE * 2)
            change = await asyncio.wait_for(waiting, Deadline(LIMIT_S).left_s)
            assert change.new.capacity == SIZE * 2 // 512
            await disk.write(SIZE, b"\x55" * 4096)
            assert await disk.read(SIZE, 4096) == b"\x55" * 4096

    asyncio.run(scenario())
