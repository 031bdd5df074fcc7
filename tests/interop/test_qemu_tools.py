"""``qemu-img`` and ``qemu-io`` of QEMU 11.1 read, write, discard and compare images that we serve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.guest.images import MIB, allocated, blank, digest, noise
from tests.interop.conftest import Serve, Tools, disk_of

pytestmark = pytest.mark.interop


def test_an_image_converted_onto_our_disk_is_the_image(tools: Tools, serve: Serve, place: Path) -> None:
    source = noise(place / "source.raw", 24 * MIB)
    target = blank(place / "target.img", 24 * MIB)
    backend = serve(target)
    tools.run("qemu-img", "convert", "-n", "--target-image-opts", "-f", "raw", str(source), disk_of(backend))
    assert digest(target) == digest(source)


def test_our_disk_converted_to_an_image_is_the_disk(tools: Tools, serve: Serve, place: Path) -> None:
    source = noise(place / "source.img", 24 * MIB)
    target = place / "target.raw"
    tools.run("qemu-img", "convert", "--image-opts", "-O", "raw", disk_of(serve(source)), str(target))
    assert digest(target) == digest(source)


def test_compare_finds_equal_disks_equal_and_one_changed_byte(tools: Tools, serve: Serve, place: Path) -> None:
    first = noise(place / "first.img", 8 * MIB)
    second = noise(place / "second.raw", 8 * MIB)
    disk = disk_of(serve(first))
    other = f"driver=file,filename={second}"
    assert "identical" in tools.run("qemu-img", "compare", "--image-opts", disk, other)
    with second.open("r+b") as file:
        file.seek(5 * MIB + 77)
        byte = file.read(1)
        file.seek(5 * MIB + 77)
        file.write(bytes([byte[0] ^ 1]))
    done = tools.attempt("qemu-img", "compare", "--image-opts", disk, other)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"offset {5 * MIB}" in done.stdout


@pytest.mark.parametrize("queues", [1, 4])
def test_patterns_written_are_read_back_where_they_belong(tools: Tools, serve: Serve, place: Path, queues: int) -> None:
    image = blank(place / "disk.img", 32 * MIB)
    disk = disk_of(serve(image, queues=queues))
    writes = [f"write -P {0x41 + number} {number * 1536 * 1024 + 512} 1M" for number in range(16)]
    tools.io(disk, *writes, "flush")
    tools.io(disk, *(write.replace("write", "read") for write in writes), "read -P 0 0 512")
    content = image.read_bytes()
    for number in range(16):
        start = number * 1536 * 1024 + 512
        assert content[start : start + MIB] == bytes([0x41 + number]) * MIB
        assert not any(content[start + MIB : start + 1536 * 1024])


def test_many_requests_in_flight_do_not_get_mixed_up(tools: Tools, serve: Serve, place: Path) -> None:
    image = blank(place / "disk.img", 32 * MIB)
    disk = disk_of(serve(image))
    writes = [f"aio_write -P {1 + number % 250} {number * 65536} 64k" for number in range(256)]
    tools.io(disk, *writes, "aio_flush", "flush")
    content = image.read_bytes()
    for number in range(256):
        assert content[number * 65536 : (number + 1) * 65536] == bytes([1 + number % 250]) * 65536


def test_discard_gives_the_space_back_and_zeroes_are_zeroes(tools: Tools, serve: Serve, place: Path) -> None:
    image = noise(place / "disk.img", 16 * MIB)
    disk = disk_of(serve(image))
    assert allocated(image) >= 16 * MIB
    tools.io(disk, "discard 4M 8M", "flush")
    assert allocated(image) <= 9 * MIB
    before = digest(image, 0, 4 * MIB), digest(image, 12 * MIB, 2 * MIB)
    tools.io(disk, "write -z 14M 1M", "write -z -u 15M 1M", "flush", "read -P 0 14M 2M")
    assert (digest(image, 0, 4 * MIB), digest(image, 12 * MIB, 2 * MIB)) == before
    with image.open("rb") as file:
        file.seek(14 * MIB)
        assert not any(file.read())


def test_a_read_only_disk_refuses_to_be_written(tools: Tools, serve: Serve, place: Path) -> None:
    image = noise(place / "disk.img", 4 * MIB)
    before = digest(image)
    disk = disk_of(serve(image, read_only=True))
    tools.run("qemu-io", "-r", "--image-opts", disk, "-c", "read 0 4M")
    done = tools.attempt("qemu-io", "--image-opts", disk, "-c", "write 0 4k")
    assert done.returncode != 0 or "failed" in (done.stdout + done.stderr).lower()
    assert digest(image) == before


def test_info_tells_the_size_that_we_serve(tools: Tools, serve: Serve, place: Path) -> None:
    disk = disk_of(serve(blank(place / "disk.img", 12 * MIB)))
    assert "12 MiB (12582912 bytes)" in tools.run("qemu-img", "info", "--image-opts", disk)


@pytest.mark.parametrize("direction", [[], ["-w", "--flush-interval=64"]], ids=["reads", "writes"])
def test_bench_runs_to_its_end(tools: Tools, serve: Serve, place: Path, direction: list[str]) -> None:
    disk = disk_of(serve(blank(place / "disk.img", 64 * MIB)))
    said = tools.run("qemu-img", "bench", "--image-opts", "-c", "20000", "-d", "32", "-s", "4096", *direction, disk)
    assert re.search(r"Run completed in [0-9.]+ seconds", said), said


def test_twenty_clients_one_after_the_other_leave_no_descriptor_behind(tools: Tools, serve: Serve, place: Path) -> None:
    backend = serve(blank(place / "disk.img", MIB))
    descriptors = Path(f"/proc/{backend.process.pid}/fd")
    tools.io(disk_of(backend), "read 0 4k")
    before = len(list(descriptors.iterdir()))
    for number in range(20):
        tools.io(disk_of(backend), f"write -P {number + 1} 0 4k", f"read -P {number + 1} 0 4k")
    assert len(list(descriptors.iterdir())) <= before
