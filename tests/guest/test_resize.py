"""The size of a disk changed while a guest uses it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.guest.backends import Ours
from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB
from tests.guest.machines import Disk, Guest

pytestmark = pytest.mark.guest


def wait_size(guest: Guest, size: int) -> None:
    """Wait until the guest's kernel has taken note of the size."""
    guest.run(f"until [ $(cat /sys/block/vda/size) = {size // 512} ]; do usleep 20000; done", 30)


@pytest.mark.covers("VHOST_USER_BACKEND_CONFIG_CHANGE_MSG")
def test_a_mounted_disk_grows_and_its_file_system_with_it(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image)
    guest = boot(Disk(backend.socket))
    guest.run("mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt && head -c 5000000 /dev/urandom >/mnt/old")
    sums = guest.run("sha256sum /mnt/old")
    backend.resize(128 * MIB)
    wait_size(guest, 128 * MIB)
    assert image.stat().st_size == 128 * MIB
    guest.run("resize2fs /dev/vda && head -c 80000000 /dev/zero | tr '\\0' x >/mnt/new && sync")
    assert guest.run("sha256sum /mnt/old") == sums
    guest.run("umount /mnt && e2fsck -f -n /dev/vda")
    assert "new size" in guest.run("dmesg")


def test_a_disk_shrinks_and_nothing_behind_its_end_is_reached(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image)
    guest = boot(Disk(backend.socket))
    guest.run("(load --direct --size=32M --threads=2 /dev/vda; echo status $?) >/tmp/said 2>&1 &")
    backend.resize(40 * MIB)
    wait_size(guest, 40 * MIB)
    assert guest.attempt("dd if=/dev/vda of=/dev/null bs=1M skip=40 count=1 iflag=direct status=none").output == ""
    guest.run("dd if=/dev/zero of=/dev/vda bs=1M seek=39 count=1 oflag=direct status=none")
    assert guest.attempt("dd if=/dev/zero of=/dev/vda bs=1M seek=40 count=1 oflag=direct status=none").status != 0
    backend.resize(48 * MIB)
    wait_size(guest, 48 * MIB)
    guest.run("dd if=/dev/zero of=/dev/vda bs=1M seek=47 count=1 oflag=direct status=none")
    said = guest.run("kill $(pidof load); until grep -q status /tmp/said; do usleep 50000; done; cat /tmp/said")
    assert said.startswith("load: ok"), said


def test_a_file_that_grew_is_noticed_on_sighup(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image)
    if not isinstance(backend, Ours):
        pytest.skip("only our back-end reads the size again on SIGHUP")
    guest = boot(Disk(backend.socket))
    os.truncate(image, 96 * MIB)
    backend.process.signal(signal.SIGHUP)
    wait_size(guest, 96 * MIB)
    guest.run("dd if=/dev/zero of=/dev/vda bs=1M seek=95 count=1 oflag=direct status=none")


def test_a_resize_between_two_guests_is_seen_by_the_second(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image)
    boot(Disk(backend.socket)).kill()
    backend.resize(80 * MIB)
    guest = boot(Disk(backend.socket))
    assert guest.run("cat /sys/block/vda/size").strip() == str(80 * MIB // 512)
