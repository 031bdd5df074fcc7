"""Tests of a back-end of your own, with pytest: the fixture starts it and gives each test its disk.

BACKEND="my-backend --socket {socket} --file {image}" pytest examples/test_my_backend.py
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vhostuser import Backoff, BlockClient, OperatorError, connect

SIZE = 8 << 20


def connected(socket: Path, backend: subprocess.Popen[bytes]) -> BlockClient:
    """The disk, once the back-end listens."""
    for wait_s in Backoff(give_up_s=30).waits():
        with suppress(OperatorError):
            return connect(socket)
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"the back-end ended with exit code {backend.wait(wait_s)}")
    pytest.fail("the back-end does not listen")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BlockClient]:
    """The disk of a back-end that was just started on an image of zeroes; both end with the test."""
    image, socket = tmp_path / "disk.img", tmp_path / "disk.sock"
    image.write_bytes(bytes(SIZE))
    with subprocess.Popen(shlex.split(os.environ["BACKEND"].format(socket=socket, image=image))) as backend:
        try:
            with connected(socket, backend) as client:
                yield client
        finally:
            backend.terminate()


def test_what_was_written_is_read(disk: BlockClient) -> None:
    data = os.urandom(disk.block_size)
    disk.write(SIZE - len(data), data)
    disk.flush()
    assert disk.read(SIZE - len(data), len(data)) == data


def test_zeroes_can_be_written(disk: BlockClient) -> None:
    disk.write(0, b"x" * 65536)
    disk.write_zeroes(4096, 8192)
    assert disk.read(0, 65536) == b"x" * 4096 + bytes(8192) + b"x" * (65536 - 12288)
