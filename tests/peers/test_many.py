"""One process drives four back-ends from one event loop, with ten thousand requests in their rings at the same time."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import struct
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Final

import pytest
from tests.peers.conftest import Serve
from tests.peers.daemons import NAMES

import vhostuser
from vhostuser.blk.requests import Read, Request, Write

BLOCK: Final = 512
BLOCKS: Final = 8192
READS: Final = 1408
WRITES: Final = 1152
DISKS: Final = 4
HOLD_S: Final = 2.0  # on an idle machine; requests are held for at least half of it
LIMIT_S: Final = 120.0


def block(disk: int, number: int, generation: int) -> bytes:
    """What is in a block: no two are alike."""
    return struct.pack("<III", disk, number, generation) * 42 + b"\0" * 8


def made(place: Path, disk: int) -> Path:
    """An image of generation 0."""
    path = place / f"disk{disk}.img"
    path.write_bytes(b"".join(block(disk, number, 0) for number in range(BLOCKS)))
    return path


def test_ten_thousand_requests_are_in_the_rings_of_four_back_ends_and_each_is_answered_rightly(
    serve: Serve, place: Path
) -> None:
    images = [made(place, number) for number in range(DISKS)]
    hold_s = HOLD_S * (1 + os.getloadavg()[0] / (os.cpu_count() or 1) / 2)
    hold = f"delay-read={hold_s:.3f}s,delay-write={hold_s:.3f}s"
    backends = [serve("ours", image, queues=4, inject=hold) for image in images]

    async def scenario() -> None:
        disks = await asyncio.gather(
            *(vhostuser.connect_async(backend.socket, queues=4, queue_size=1024) for backend in backends)
        )
        reads: list[Awaitable[Any]] = []
        writes: list[Awaitable[Any]] = []
        for number, disk in enumerate(disks):
            for queue in range(4):
                first = queue * READS // 4
                wanted: list[Request] = [Read(BLOCK * (first + at), BLOCK) for at in range(READS // 4)]
                reads += disk.submit_all(wanted, queue=queue)
                first = READS + queue * WRITES // 4
                wanted = [Write(BLOCK * at, block(number, at, 1)) for at in range(first, first + WRITES // 4)]
                writes += disk.submit_all(wanted, queue=queue)
        await asyncio.sleep(0)  # once around the loop: whatever was answered by now is taken out of the rings
        await asyncio.sleep(0)
        assert sum(disk.outstanding for disk in disks) >= 10_000
        answers = await asyncio.wait_for(asyncio.gather(*reads), LIMIT_S)
        assert answers == [block(number, at, 0) for number in range(DISKS) for at in range(READS)]
        await asyncio.wait_for(asyncio.gather(*writes), LIMIT_S)
        assert not any(disk.outstanding for disk in disks)
        await asyncio.gather(*(disk.close() for disk in disks))

    asyncio.run(scenario())
    for backend in backends:
        backend.stop()
    for number, image in enumerate(images):
        generations = itertools.chain([0] * READS, [1] * WRITES, [0] * (BLOCKS - READS - WRITES))
        assert image.read_bytes() == b"".join(block(number, at, kind) for at, kind in enumerate(generations))


@pytest.mark.interop
def test_four_back_ends_of_different_makers_are_driven_by_one_loop(serve: Serve, place: Path) -> None:
    names = [name for name in NAMES if name != "ours"]
    backends = [serve(name, made(place, number), queues=2) for number, name in enumerate(names)]

    async def drive(number: int, path: Path) -> None:
        async with await vhostuser.connect_async(path, queues=2, queue_size=256) as disk:
            for generation in range(1, 4):
                order = random.Random(generation).sample(range(BLOCKS), BLOCKS)
                for part in range(0, BLOCKS, 2048):
                    chosen = order[part : part + 2048]
                    await asyncio.gather(
                        *disk.submit_all(Write(BLOCK * at, block(number, at, generation)) for at in chosen)
                    )
                answers = await asyncio.gather(*disk.submit_all(Read(BLOCK * at, BLOCK) for at in order))
                assert answers == [block(number, at, generation) for at in order]

    async def scenario() -> None:
        await asyncio.gather(*(drive(number, backend.socket) for number, backend in enumerate(backends)))

    asyncio.run(scenario())
