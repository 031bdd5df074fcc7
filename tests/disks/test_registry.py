"""From the text of a command line to an open disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostuser.disks import Capability, Disk, FileDisk, Limits, MemoryDisk, NullDisk, open_disk, parse_size
from vhostuser.errors import OperatorError, UsageError

SIZES = {
    "0": 0,
    "512": 512,
    "1K": 1 << 10,
    "10k": 10 << 10,
    "1M": 1 << 20,
    "3G": 3 << 30,
    "1T": 1 << 40,
    "1.5G": 3 << 29,
    "0.5K": 512,
    "4GiB": 4 << 30,
    "4GB": 4 << 30,
    " 2M ": 2 << 20,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_have_suffixes_of_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1e9", "0x10", "1.0001K", "0.1", "16E", "9" * 30, "1 2", "NaN"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_memory_and_null_disks_are_named_with_their_size() -> None:
    with open_disk("memory:size=1M") as memory, open_disk("null:size=1T") as null:
        assert isinstance(memory, MemoryDisk)
        assert isinstance(null, NullDisk)
        assert (memory.limits.size, null.limits.size) == (1 << 20, 1 << 40)
        assert open_disk(memory.name).limits.size == 1 << 20


def test_a_path_is_a_file_even_if_it_looks_like_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("memory:size=1M", "disk:one"):
        (tmp_path / name).write_bytes(bytes(4096))
        with open_disk(f"./{name}") as disk:
            assert isinstance(disk, FileDisk)
    with open_disk("disk:one") as disk:
        assert disk.name == "disk:one"


@pytest.mark.parametrize(
    "text", ["", "memory:", "memory:size", "memory:size=", "memory:1G", "null:size=x", "nbd:localhost", "memory:size=0"]
)
def test_a_text_that_makes_no_sense_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        open_disk(text)


def test_options_that_do_not_exist_are_usage_errors(tmp_path: Path) -> None:
    for options in ({"cache": "fast"}, {"engine": "aio"}):
        with pytest.raises(UsageError):
            open_disk("memory:size=1M", **options)  # type: ignore[arg-type]


def test_a_missing_file_is_said_to_be_missing() -> None:
    with pytest.raises(OperatorError, match=r"No such file"):
        open_disk("/nowhere/disk.img")


@pytest.mark.parametrize("text", ["memory:size=1M", "null:size=1M"])
def test_read_only_and_write_through_reach_the_disk(text: str) -> None:
    disk = open_disk(text, read_only=True, cache="writethrough")
    assert Capability.WRITE not in disk.capabilities
    assert not disk.writeback


def test_a_disk_resizes_in_memory_and_keeps_its_name_true() -> None:
    with MemoryDisk(1 << 20) as disk:
        disk.resize(1 << 21)
        assert disk.limits.size == disk.refresh() == 1 << 21
        assert disk.name == "memory:size=2097152"
        with pytest.raises(UsageError):
            disk.resize(100)


def test_a_disk_of_a_user_has_no_engine_and_reads_itself() -> None:
    class Letters(Disk):
        @property
        def limits(self) -> Limits:
            return Limits(size=512)

        @property
        def name(self) -> str:
            return "letters"

        def read(self, offset: int, into: memoryview) -> None:
            into[:] = b"x" * len(into)

    letters = Letters()
    buffer = bytearray(3)
    letters.read(0, memoryview(buffer))
    assert buffer == b"xxx"
    assert letters.engine() is None
    with pytest.raises(OSError, match="Read-only"):
        letters.write(0, memoryview(b"abc"))
    with pytest.raises(UsageError):
        letters.resize(1)
