"""Files and block devices as storage: what is found out about them, and what is refused with its reason."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostuser.disks import Capability, FileDisk, Limits, storage
from vhostuser.errors import OperatorError, UsageError

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """An image on tmpfs, which zeroes nothing by itself."""
    path = Path("/dev/shm") / f"vhostuser-test-{os.getpid()}.img"
    path.write_bytes(bytes(SIZE))
    yield path
    path.unlink()


@pytest.fixture
def loop(image: Path) -> Iterator[Path]:
    """A block device over `image` with blocks of 4096 bytes."""
    tool = shutil.which("losetup")
    if tool is None or os.geteuid() != 0:
        pytest.skip("making a loop device needs losetup and root")
    made = subprocess.run(
        [tool, "--find", "--show", "--sector-size", "4096", image], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device can be made: {made.stderr}")
    device = made.stdout.strip()
    yield Path(device)
    subprocess.run([tool, "--detach", device], check=True)


def test_a_file_has_its_size_and_what_its_file_system_can_do(image: Path) -> None:
    with FileDisk(image) as disk:
        assert disk.limits.size == SIZE
        assert disk.limits.block_size == 512
        assert disk.limits.physical_block_size == disk.limits.discard_alignment == image.stat().st_blksize
        assert Capability.WRITE | Capability.FLUSH | Capability.RESIZE | Capability.WRITE_ZEROES in disk.capabilities
        assert disk.writeback
        assert not disk.is_block_device
        assert disk.name == str(image)
        assert disk.engine().name in ("io_uring", "syscalls")


def test_asking_what_a_file_system_can_do_changes_nothing(image: Path) -> None:
    image.write_bytes(b"data" * 1000)
    before = image.stat()
    FileDisk(image).close()
    after = image.stat()
    assert image.read_bytes() == b"data" * 1000
    assert (before.st_size, before.st_blocks) == (after.st_size, after.st_blocks)
    assert [path.name for path in image.parent.iterdir()] == [image.name]


def test_the_file_system_says_truly_whether_it_punches_and_zeroes(image: Path, in_memory: Path) -> None:
    for path in (image, in_memory):
        found = subprocess.run(
            ["fallocate", "--zero-range", "--keep-size", "--offset", "0", "--length", "4096", path],
            capture_output=True, check=False,
        )  # fmt: skip
        assert storage.can_zero_ranges(str(path)) == (found.returncode == 0)
        found = subprocess.run(
            ["fallocate", "--punch-hole", "--offset", "0", "--length", "4096", path], capture_output=True, check=False
        )
        with open(path, "r+b") as file:
            assert storage.can_punch_holes(file.fileno()) == (found.returncode == 0)


def test_zeroes_that_have_to_be_written_are_offered_in_short_pieces(in_memory: Path) -> None:
    if storage.can_zero_ranges(str(in_memory)):
        pytest.skip("tmpfs zeroes ranges on this kernel")
    with FileDisk(in_memory) as disk:
        assert disk.limits.max_write_zeroes == 16 << 20
        assert disk.limits.write_zeroes_may_unmap


def test_read_only_means_no_ability_to_change_anything(image: Path) -> None:
    with FileDisk(image, read_only=True) as disk:
        assert disk.capabilities == Capability.FLUSH
        with pytest.raises(UsageError, match="read-only"):
            disk.resize(2 * SIZE)


@pytest.mark.parametrize(("cache", "writeback"), [("writeback", True), ("writethrough", False), ("none", True)])
def test_the_cache_mode_decides_what_the_guest_finds(image: Path, cache: str, writeback: bool) -> None:
    with FileDisk(image, cache=cache) as disk:
        assert disk.writeback is writeback


@pytest.mark.parametrize("engine", ["auto", "io_uring", "syscalls"])
def test_every_engine_can_be_asked_for(image: Path, engine: str) -> None:
    with FileDisk(image, engine=engine) as disk:
        assert engine in ("auto", disk.engine().name)


def test_direct_io_raises_the_block_size_to_what_it_demands(image: Path) -> None:
    with FileDisk(image, cache="none") as disk, open(image, "rb") as file:
        memory, offset = storage.direct_alignment(file.fileno())
        assert memory >= 1
        assert offset >= 512
        assert disk.limits.block_size == max(512, offset)


def test_without_statx_the_device_below_says_what_direct_io_demands(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(image, "rb") as file:
        monkeypatch.setattr(storage, "_statx_alignment", lambda fd: None)
        memory, offset = storage.direct_alignment(file.fileno())
        assert memory == offset == (storage.queue_number(file.fileno(), "logical_block_size") or 4096)


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "device"])
def test_what_is_no_image_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/null")
    reason = {"missing": "No such file", "directory": "it is a directory"}.get(
        kind, "neither a file nor a block device"
    )
    with pytest.raises(OperatorError, match=reason):
        FileDisk(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_only_be_read_brings_the_advice_to_serve_it_read_only(image: Path) -> None:
    image.chmod(stat.S_IRUSR)
    with pytest.raises(OperatorError, match="--read-only"):
        FileDisk(image)
    FileDisk(image, read_only=True).close()


def test_unknown_modes_are_usage_errors(image: Path) -> None:
    with pytest.raises(UsageError):
        FileDisk(image, cache="fast")
    with pytest.raises(UsageError):
        FileDisk(image, engine="threads")


def test_a_file_is_resized_and_its_size_read_again(image: Path) -> None:
    with FileDisk(image) as disk:
        disk.resize(2 * SIZE)
        assert disk.limits.size == image.stat().st_size == 2 * SIZE
        os.truncate(image, SIZE // 2)
        assert disk.limits.size == 2 * SIZE
        assert disk.refresh() == disk.limits.size == SIZE // 2
        with pytest.raises(UsageError):
            disk.resize(0)


def test_flushing_uses_an_open_file_of_its_own(image: Path) -> None:
    with FileDisk(image) as disk:
        before = len(os.listdir("/proc/self/fd"))
        disk.flush()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_disk_keeps_nothing_open(image: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    disk = FileDisk(image)
    disk.close()
    disk.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        disk.engine()


def test_a_block_device_has_its_own_sizes_and_is_opened_exclusively(loop: Path) -> None:
    with FileDisk(loop) as disk:
        assert disk.is_block_device
        assert disk.limits.size == SIZE
        assert disk.limits.block_size == 4096
        assert disk.limits.physical_block_size >= 4096
        assert Capability.RESIZE not in disk.capabilities
        assert Capability.WRITE_ZEROES in disk.capabilities
        with pytest.raises(OperatorError, match="Something uses this device"):
            FileDisk(loop)
        with pytest.raises(UsageError, match="own tools"):
            disk.resize(2 * SIZE)
        FileDisk(loop, lock=False).close()
        assert disk.refresh() == SIZE


def test_a_block_device_is_handed_over_to_another_host_alone(loop: Path) -> None:
    """To a second host, here nobody, it looks as if nobody had it."""
    with FileDisk(loop), pytest.raises(OperatorError, match="a block device is handed over to another host only"):
        FileDisk(loop, incoming=True, lock_timeout_s=30)
    with FileDisk(loop, incoming=True) as destination:
        assert destination.activate() is not None


def test_a_block_device_that_its_holder_gives_up_in_time_is_waited_for(loop: Path) -> None:
    holder = FileDisk(loop)
    timer = threading.Timer(0.1, holder.close)
    timer.start()
    try:
        FileDisk(loop, lock_timeout_s=30).close()
    finally:
        timer.join()


def test_limits_are_bytes_and_frozen() -> None:
    with pytest.raises(AttributeError):
        Limits(512).size = 1  # type: ignore[misc]
