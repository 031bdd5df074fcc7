"""A copy of memory that is made of logged pages alone is memory: random loads, rings, and lives of the log."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.frontend.conftest import Serve
from tests.frontend.logged import LoggedDisk, Shape

from vhostuser.blk import BlockDevice
from vhostuser.disks import Disk, FileDisk, MemoryDisk
from vhostuser.disks.faulty import Faults, FaultyDisk


@pytest.fixture(params=["memory", "io_uring", "syscalls", "io_uring+faults"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk of 1 MiB; half of the reads fail for one of the kinds, and all take a while."""
    if request.param == "memory":
        yield MemoryDisk(1 << 20)
        return
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(7).randbytes(1 << 20))
    file = FileDisk(str(image), engine=request.param.removesuffix("+faults"))
    if "faults" in request.param:
        with FaultyDisk(file, Faults.parse("error-read=0.5,delay-read=1ms")) as faulty:
            yield faulty
    else:
        with file:
            yield file


@pytest.mark.parametrize("seed", range(2))
def test_a_copy_of_logged_pages_is_memory_whenever_the_rings_stop(disk: Disk, serve: Serve, seed: int) -> None:
    with LoggedDisk(serve(BlockDevice(disk, num_queues=4)), Shape.drawn(seed)) as run:
        seen = run.run()
    assert seen.differing == set()
    assert seen.answered > 50
    assert seen.checks > 1
    assert seen.pages > 50
