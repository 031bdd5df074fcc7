"""Storage that fills up under a guest: its requests are held, and it never hears of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.guest.backends import Ours
from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB, blank
from tests.guest.machines import Disk, Guest
from tests.guest.processes import POLL_S, Deadline, readable

pytestmark = pytest.mark.guest

LIMIT_S = 60.0


@pytest.fixture
def full(place: Path) -> Iterator[Path]:
    """A sparse image of 64 MiB on a file system with room for 16."""
    if os.geteuid() != 0:
        pytest.skip("a file system that fills up has to be mounted: only root may")
    where = place / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(where)], check=True)
    yield blank(where / "disk.img", 64 * MIB)
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def give_room(image: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=80m", str(image.parent)], check=True)


def wait_held(backend: Ours) -> None:
    deadline = Deadline(LIMIT_S)
    while not any(one["state"] == "held" for one in backend.in_flight()):
        assert deadline.left_s, "no request is held"
        readable([backend.process], POLL_S)


def begin_load(guest: Guest, words: str) -> None:
    """A load that verifies itself, in the guest's background."""
    guest.run(f"(load {words} /dev/vda; echo status $?) >/tmp/said 2>&1 &")


def end_of_load(guest: Guest) -> str:
    return guest.run("until grep -q status /tmp/said; do usleep 50000; done; cat /tmp/said", LIMIT_S)


def assert_unharmed(guest: Guest) -> None:
    """The guest's kernel has seen no error of its disk."""
    said = guest.run("dmesg")
    for trouble in ("I/O error", "blk_update_request", "Buffer I/O", "EXT4-fs error", "hung_task", "blocked for more"):
        assert trouble not in said, said[-2000:]


def test_a_guest_goes_on_after_a_full_file_system_was_given_room(serve: Serve, boot: Boot, full: Path) -> None:
    backend = serve(full, on_enospc="hold", queues=2)
    assert isinstance(backend, Ours)
    guest = boot(Disk(backend.socket, options={"num-queues": 2}), cpus=2)
    begin_load(guest, "--direct --threads=4 --largest=256K --size=48M --seconds=12")
    wait_held(backend)
    give_room(full)
    assert " tried again" in backend.retry()
    said = end_of_load(guest)
    assert said.startswith("load: ok"), said
    assert not any(one["state"] == "held" for one in backend.in_flight())
    assert_unharmed(guest)


def test_a_file_system_in_the_guest_survives_one_on_the_host_that_is_full(serve: Serve, boot: Boot, full: Path) -> None:
    backend = serve(full, on_enospc="hold")
    assert isinstance(backend, Ours)
    guest = boot(Disk(backend.socket))
    guest.run("mke2fs -q -t ext4 -E nodiscard /dev/vda && mount /dev/vda /mnt")
    guest.run(
        "head -c 30000000 /dev/urandom >/tmp/data; (cp /tmp/data /mnt/data; sync; echo status $?) >/tmp/said 2>&1 &"
    )
    wait_held(backend)
    give_room(full)
    assert " tried again" in backend.retry()
    assert end_of_load(guest).endswith("status 0\n")
    guest.run("echo 3 >/proc/sys/vm/drop_caches; cmp /tmp/data /mnt/data && umount /mnt && e2fsck -f -n /dev/vda")
    assert_unharmed(guest)


def test_held_requests_are_completed_by_the_successor_of_a_killed_back_end(
    serve: Serve, boot: Boot, full: Path
) -> None:
    backend = serve(full, on_enospc="hold")
    assert isinstance(backend, Ours)
    guest = boot(Disk(backend.socket, reconnect=True))
    begin_load(guest, "--direct --threads=4 --largest=256K --size=48M --seconds=12")
    wait_held(backend)
    backend.kill()
    give_room(full)
    backend.restart()
    said = end_of_load(guest)
    assert said.startswith("load: ok"), said
    assert_unharmed(guest)
