"""Machines that start from the disk: a root file system on it, and the firmware's own driver reading and writing it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB, bootable, root_file_system, written_sum
from tests.guest.machines import Disk
from tests.guest.prepare import Machine

pytestmark = pytest.mark.guest


def test_a_guest_lives_on_its_root_file_system_on_the_disk(
    serve: Serve, boot: Boot, place: Path, machine: Machine
) -> None:
    image = root_file_system(place / "root.img", 96 * MIB, machine)
    guest = boot(Disk(serve(image).socket), append="vhostuser.root=/dev/vda")
    assert "/dev/vda / ext4" in guest.run("cat /proc/mounts")
    said = guest.run("truncate -s 40M /root/file && load --direct --size=40M --block=4096 --seconds=2 /root/file")
    assert said.startswith("load: ok"), said
    sums = guest.run("sha256sum /root/file && sync")
    guest.reset()
    assert "/dev/vda / ext4" in guest.run("cat /proc/mounts")
    assert guest.run("sha256sum /root/file") == sums


def test_the_firmware_reads_the_disk_and_writes_to_it(serve: Serve, boot: Boot, place: Path) -> None:
    image, folded = bootable(place / "boot.img")
    guest = boot(Disk(serve(image).socket, options={"bootindex": 1}), firmware_only=True)
    printed = guest.wait_console(r"(SUM|BAD) [0-9a-f]+\n")
    assert printed == f"SUM {folded:08x}\n"
    assert written_sum(image) == folded
