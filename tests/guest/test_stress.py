"""Violence under load: resets, unbinding, plugging, more memory, kills. What was reported as flushed must be there."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB, blank
from tests.guest.machines import Disk
from tests.guest.sweeps import Sweep

pytestmark = pytest.mark.guest

WAIT_FOR_DISK = "until [ -b /dev/vda ]; do usleep 20000; done"
WAIT_FOR_NO_DISK = "until [ ! -e /sys/block/vda ]; do usleep 20000; done"


def test_a_machine_reset_under_load_loses_nothing_flushed(serve: Serve, boot: Boot, image: Path) -> None:
    guest = boot(Disk(serve(image).socket))
    sweep = Sweep("/dev/vda")
    for _ in range(3):
        sweep.start(guest)
        sweep.wait_rounds(guest, 6)
        guest.reset()
        sweep.note(guest)
        sweep.check(guest)


def test_the_driver_unbound_under_load_and_bound_again_loses_nothing(serve: Serve, boot: Boot, image: Path) -> None:
    guest = boot(Disk(serve(image).socket))
    sweep = Sweep("/dev/vda")
    for _ in range(3):
        sweep.start(guest)
        sweep.wait_rounds(guest, 6)
        guest.run("echo virtio0 >/sys/bus/virtio/drivers/virtio_blk/unbind")
        assert "gone" in sweep.ended(guest)
        guest.run("echo virtio0 >/sys/bus/virtio/drivers/virtio_blk/bind && " + WAIT_FOR_DISK)
        sweep.check(guest)


def test_a_disk_is_plugged_in_and_pulled_under_load(serve: Serve, boot: Boot, image: Path) -> None:
    disk = Disk(serve(image).socket, "plugged")
    guest = boot(ports=1)
    sweep = Sweep("/dev/vda")
    for _ in range(3):
        guest.plug(disk)
        guest.run(WAIT_FOR_DISK)
        if any(sweep.floors):
            sweep.check(guest)
        sweep.start(guest)
        sweep.wait_rounds(guest, 6)
        guest.unplug(disk)
        assert "gone" in sweep.ended(guest)
        guest.run(WAIT_FOR_NO_DISK)


@pytest.mark.covers("VHOST_USER_ADD_MEM_REG")
def test_memory_is_plugged_in_under_load_and_used_for_it(serve: Serve, boot: Boot, place: Path) -> None:
    guest = boot(Disk(serve(blank(place / "disk.img", 512 * MIB)).socket), memory_mib=256, spare_memory_mib=768)
    total = "awk '/MemTotal/ {print $2}' /proc/meminfo"
    before = int(guest.run(total))
    guest.run(
        "(load --direct --discard --threads=2 --largest=4M --size=64M /dev/vda; echo status $?) >/tmp/said 2>&1 &"
    )
    for number in range(1, 4):
        guest.plug_memory(256)
        guest.run(
            f"until [ $(({total.join(['$(', ')'])})) -gt {before + (number * 256 - 64) * 1024} ]; do "
            "for block in /sys/devices/system/memory/memory*; do "
            "grep -q offline $block/state && echo online >$block/state; done; usleep 50000; done",
            60,
        )
    # Buffers of more bytes than the machine had at its start: the disk reads and writes the new memory.
    said = guest.run("load --direct --offset=64M --threads=40 --largest=8M --seconds=6 /dev/vda", 120)
    assert said.startswith("load: ok"), said
    said = guest.run("kill $(pidof load); until grep -q status /tmp/said; do usleep 50000; done; cat /tmp/said")
    assert said.startswith("load: ok"), said


def test_a_machine_killed_under_load_is_followed_by_another_that_finds_everything(
    serve: Serve, boot: Boot, image: Path
) -> None:
    disk = Disk(serve(image).socket)
    sweep = Sweep("/dev/vda")
    guest = boot(disk)
    for _ in range(3):
        sweep.start(guest)
        sweep.wait_rounds(guest, 6)
        guest.kill()
        sweep.note(guest)
        guest = boot(disk)
        sweep.check(guest)
