"""A disk as a file: what a plain file would do, but for its size."""

from __future__ import annotations

import io
import os
import random

import pytest
from tests.blk_client.conftest import SIZE
from tests.frontend.conftest import Serve

import vhostuser
from vhostuser import BlockDevice, DiskFile, MemoryDisk, Transport


def test_any_bytes_are_written_and_read_as_in_a_plain_file(disk: Transport) -> None:
    draw = random.Random(11)
    model = io.BytesIO(bytes(SIZE))
    with vhostuser.connect(disk) as client, client.file() as file:
        for _ in range(150):
            offset, length = draw.randrange(20_000), draw.choice([1, 5, 511, 512, 513, 4096, 9999])
            data = draw.randbytes(length)
            for one in (model, file):
                one.seek(offset)
                assert one.write(data) == length
            offset = draw.randrange(20_000)
            assert file.seek(offset) == model.seek(offset)
            assert file.read(length) == model.read(length)
            assert file.tell() == model.tell()
        assert client.read(0, 32768) == model.getvalue()[:32768]


def test_the_end_of_the_disk_is_the_end_of_the_file(disk: Transport) -> None:
    with vhostuser.connect(disk) as client, client.file() as file:
        assert file.seek(-10, os.SEEK_END) == SIZE - 10
        assert file.write(b"x" * 20) == 10
        assert file.tell() == SIZE
        with pytest.raises(OSError, match="No space left"):
            file.write(b"y")
        assert file.write(b"") == 0
        assert file.read(5) == b""
        file.seek(-15, os.SEEK_CUR)
        assert file.read() == bytes(5) + b"x" * 10
        assert file.seek(SIZE + 100) == SIZE + 100
        assert file.read(1) == b""
        with pytest.raises(OSError, match="Invalid"):
            file.seek(-1)
        with pytest.raises(ValueError, match="whence"):
            file.seek(0, 7)


def test_buffered_readers_and_writers_stand_on_it(disk: Transport) -> None:
    with vhostuser.connect(disk) as client:
        with io.BufferedRandom(client.file()) as file:  # type: ignore[type-var]
            for number in range(1000):
                file.write(b"%08d" % number)
            file.seek(8 * 500)
            assert file.read(8) == b"00000500"
        assert client.connected, "closing the file leaves the client open"
        assert client.read(0, 512)[:16] == b"0000000000000001"


def test_a_closed_file_is_closed_and_a_read_only_disk_is_not_writable(serve: Serve) -> None:
    with vhostuser.connect(serve(BlockDevice(MemoryDisk(SIZE, read_only=True)))) as client:
        file: DiskFile = client.file()
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.seek(0)
        with pytest.raises(ValueError, match="closed"):
            file.read(1)
