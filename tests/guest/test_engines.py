"""Every kind of storage behind the disk, and storage that is slow or fails, under loads that verify themselves."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from tests.guest.backends import Ours
from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB, blank
from tests.guest.machines import Disk, Guest

pytestmark = pytest.mark.guest


def loaded_together(guest: Guest, loads: dict[str, str]) -> dict[str, str]:
    """Run one load on each disk at the same time and return what each said; all of them must have ended well."""
    for name, words in loads.items():
        guest.run(f"(load {words} /dev/{name}; echo status $?) >/tmp/{name} 2>&1 &")
    said = {
        name: guest.run(f"until grep -q status /tmp/{name}; do usleep 50000; done; cat /tmp/{name}", 120)
        for name in loads
    }
    for name, line in said.items():
        assert line.startswith("load: ok"), f"{name}: {line}"
        assert "status 0" in line, f"{name}: {line}"
    return said


def test_every_engine_serves_a_load(serve: Serve, boot: Boot, place: Path) -> None:
    backends = [
        serve(blank(place / "uring.img", 32 * MIB), engine="io_uring"),
        serve(blank(place / "calls.img", 32 * MIB), engine="syscalls"),
        serve(blank(place / "through.img", 32 * MIB), cache="writethrough"),
        serve("memory:size=32M"),
    ]
    disks = [Disk(backend.socket, f"d{number}") for number, backend in enumerate(backends)]
    guest = boot(*disks, memory_mib=384, cpus=2)
    names = [f"vd{chr(ord('a') + number)}" for number in range(len(disks))]
    loaded_together(guest, dict.fromkeys(names, "--direct --discard --threads=2 --largest=4M --seconds=4"))
    for name in names:
        guest.run(f"load --size=24M --offset=3584 --seconds=1 /dev/{name}")  # through the page cache, at odd offsets


def test_disks_around_the_page_cache_serve_a_load(serve: Serve, boot: Boot, place: Path) -> None:
    images = [blank(place / f"{engine}.img", 32 * MIB) for engine in ("io_uring", "syscalls")]
    try:
        os.close(os.open(images[0], os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"{place} is on a file system without O_DIRECT: {error}")
    backends = [serve(image, engine=image.stem, cache="none") for image in images]
    guest = boot(*(Disk(backend.socket, f"d{number}") for number, backend in enumerate(backends)), cpus=2)
    loaded_together(guest, dict.fromkeys(("vda", "vdb"), "--direct --discard --threads=3 --largest=4M --seconds=4"))
    guest.run("load --size=24M --offset=3584 --seconds=1 /dev/vda")


def test_slow_storage_answers_out_of_order_and_nothing_gets_mixed_up(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image, inject="delay-read=8ms,delay-write=12ms,delay-flush=20ms")
    guest = boot(Disk(backend.socket))
    said = loaded_together(guest, {"vda": "--direct --discard --threads=32 --largest=256K --seconds=4"})["vda"]
    assert int(re.findall(r"reads=(\d+)", said)[0]) > 100


def test_requests_that_storage_fails_fail_in_the_guest_and_no_others(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image, inject="error-read=3%,error-write=3%,seed=5")
    guest = boot(Disk(backend.socket))
    said = loaded_together(guest, {"vda": "--direct --threads=8 --largest=64K --seconds=4 --on-error=note"})["vda"]
    assert int(re.findall(r"errors=(\d+)", said)[0]) > 0
    assert "mismatches=0" in said


def test_a_disk_of_a_terabyte_of_nothing_is_read_to_its_end(serve: Serve, boot: Boot) -> None:
    backend = serve("null:size=1T")
    if not isinstance(backend, Ours):
        pytest.skip("only our back-end has such a disk")
    guest = boot(Disk(backend.socket))
    assert guest.run("blockdev --getsize64 /dev/vda").strip() == str(1 << 40)
    last = (1 << 40) // 4096 - 1
    guest.run(f"dd if=/dev/zero of=/dev/vda bs=4096 seek={last} count=1 oflag=direct status=none")
    guest.run(f"dd if=/dev/vda of=/dev/null bs=4096 skip={last} count=1 iflag=direct status=none")
