"""An image in memory is copied from and to without system calls; others may do to it what they like meanwhile."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import vhostuser
from vhostuser import Read, RequestFailed

from .conftest import WAIT_S, Serving, file_system_in_memory

Start = Callable[..., Serving]

MIB = 1 << 20
PAGE = 4096
ENGINES = pytest.mark.parametrize("engine", ["io_uring", "syscalls"])


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory whose files are in memory, unless this machine has none."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        yield Path(place)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory with room for 6 MiB."""
    with file_system_in_memory(tmp_path / "small", "6m") as where:
        yield where


def make(image: Path) -> Path:
    """4 MiB, each page with its number in every byte."""
    image.write_bytes(b"".join(bytes([number % 251]) * PAGE for number in range(4 * MIB // PAGE)))
    return image


def warm_up(client: vhostuser.BlockClient) -> None:
    """So much that what can be copied without system calls is."""
    for _ in range(3):
        reads = client.submit_all([Read(number * PAGE, PAGE) for number in range(4 * MIB // PAGE)])
        assert [read.result(WAIT_S)[0] for read in reads] == [number % 251 for number in range(4 * MIB // PAGE)]


def fill(path: Path) -> None:
    """Make a file of all the room that there is."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(PAGE)):
            pass
    usage = os.statvfs(path)
    assert usage.f_bfree == 0


@ENGINES
def test_an_image_that_somebody_shortens_costs_the_requests_beyond_its_end(
    serving: Start, in_memory: Path, engine: str
) -> None:
    image, place = make(in_memory / "disk.img"), in_memory / "disk.sock"
    serving("serve", str(image), "--socket", str(place), "--engine", engine)
    with vhostuser.connect(str(place)) as client:
        warm_up(client)
        os.truncate(image, 2 * MIB)
        with pytest.raises(RequestFailed):
            client.read(3 * MIB, PAGE)
        assert client.read(MIB, PAGE) == bytes([MIB // PAGE % 251]) * PAGE
        client.write(PAGE, b"\xaa" * PAGE)
        os.truncate(image, 4 * MIB)
        assert client.read(3 * MIB, PAGE) == bytes(PAGE)
        client.write(3 * MIB, b"\xbb" * PAGE)
        client.flush()
    with image.open("rb") as file:
        assert os.pread(file.fileno(), PAGE, PAGE) == b"\xaa" * PAGE
        assert os.pread(file.fileno(), PAGE, 3 * MIB) == b"\xbb" * PAGE


@ENGINES
def test_a_write_for_which_there_is_no_memory_fails_and_works_once_there_is(
    serving: Start, small: Path, tmp_path: Path, engine: str
) -> None:
    image, place = make(small / "disk.img"), tmp_path / "disk.sock"
    serving("serve", str(image), "--socket", str(place), "--engine", engine)
    with vhostuser.connect(str(place)) as client:
        warm_up(client)
        punch = ["fallocate", "--punch-hole", "--offset", str(MIB), "--length", str(PAGE), str(image)]
        subprocess.run(punch, check=True)
        rest = small / "rest"
        fill(rest)
        with pytest.raises(RequestFailed):
            client.write(MIB, b"\xcc" * PAGE)
        client.write(MIB + PAGE, b"\xdd" * PAGE)
        rest.unlink()
        client.write(MIB, b"\xcc" * PAGE)
        assert client.read(MIB, 2 * PAGE) == b"\xcc" * PAGE + b"\xdd" * PAGE


@ENGINES
def test_the_time_of_the_last_write_is_noted(serving: Start, in_memory: Path, engine: str) -> None:
    image, place = make(in_memory / "disk.img"), in_memory / "disk.sock"
    serving("serve", str(image), "--socket", str(place), "--engine", engine)
    with vhostuser.connect(str(place)) as client:
        warm_up(client)
        for _ in range(10):
            client.write(0, b"\1" * PAGE)
        asked_ns = time.time_ns()
        client.write(PAGE, b"\2" * PAGE)
        # The clock of files is a few milliseconds behind; the worker notes the time once it has nothing to do.
        end = time.monotonic() + WAIT_S
        while image.stat().st_mtime_ns < asked_ns - 10_000_000:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_what_a_guest_discards_is_given_back_and_reads_as_zeroes(serving: Start, in_memory: Path) -> None:
    image, place = make(in_memory / "disk.img"), in_memory / "disk.sock"
    serving("serve", str(image), "--socket", str(place))
    with vhostuser.connect(str(place)) as client:
        warm_up(client)
        client.discard(MIB, MIB)
        assert image.stat().st_blocks * 512 == 3 * MIB
        assert client.read(MIB, MIB) == bytes(MIB)
        client.write(MIB, b"\3" * PAGE)
        assert client.read(MIB, 2 * PAGE) == b"\3" * PAGE + bytes(PAGE)
