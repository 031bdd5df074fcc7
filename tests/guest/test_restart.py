"""A back-end that is upgraded and restarted under a guest that works: the guest sees slow requests and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.guest.backends import Ours
from tests.guest.conftest import Boot, Serve
from tests.guest.machines import Disk, Guest

from vhostuser.control import ControlClient

pytestmark = pytest.mark.guest

TIMES = 5
SECTORS = 4096
"""What the guest writes, at least, between two of them."""


def work(guest: Guest) -> None:
    """Start a load that reads back what it wrote."""
    guest.run(
        "dmesg -c >/dev/null; (load --direct --threads=3 --largest=256K /dev/vda; echo status $?) >/tmp/said 2>&1 &"
    )


def wait_for_work(guest: Guest) -> None:
    """Wait until the guest has written some more; requests that are under way come first."""
    written = "awk '{print $7}' /sys/block/vda/stat"
    guest.run(f"before=$({written}); until [ $(({written.join(['$(', ')'])})) -gt $((before + {SECTORS})) ]; do "
              "grep status /tmp/said && exit 1; usleep 20000; done", 120)  # fmt: skip


def check_work(guest: Guest) -> None:
    """End the load: it found every block as it wrote it, and the kernel complained about nothing."""
    said = guest.run("kill $(pidof load); until grep -q status /tmp/said; do usleep 50000; done; cat /tmp/said", 120)
    assert re.search(r"^load: ok .* errors=0 mismatches=0$", said, re.MULTILINE), said
    assert "status 0" in said
    assert "error" not in guest.run("dmesg | grep -i -e 'error' -e 'timeout' -e 'vda.*reset' || true")


@pytest.mark.parametrize("inject", [None, "delay-read=5ms,delay-write=20ms,delay-flush=20ms"], ids=["fast", "slow"])
def test_upgrades_under_load_are_not_noticed(serve: Serve, boot: Boot, image: Path, inject: str | None) -> None:
    backend = serve(image, queues=1, inject=inject)
    if not isinstance(backend, Ours):
        pytest.skip("only our back-end hands over")
    guest = boot(Disk(backend.socket, reconnect=True))
    work(guest)
    for _ in range(TIMES):
        wait_for_work(guest)
        backend.upgrade()
    wait_for_work(guest)
    check_work(guest)


@pytest.mark.parametrize("inject", [None, "delay-read=5ms,delay-write=20ms,delay-flush=20ms"], ids=["fast", "slow"])
def test_restarts_under_load_are_not_noticed(serve: Serve, boot: Boot, image: Path, inject: str | None) -> None:
    backend = serve(image, queues=1, inject=inject)
    guest = boot(Disk(backend.socket, reconnect=True))
    work(guest)
    for _ in range(TIMES):
        wait_for_work(guest)
        backend.stop()
        backend.restart()
    wait_for_work(guest)
    check_work(guest)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_write_cache_that_the_guest_switched_off_stays_off(serve: Serve, boot: Boot, image: Path, how: str) -> None:
    """The guest sends no flush any more, and its hypervisor does not repeat the byte to the successor."""
    backend = serve(image, queues=1)
    if not isinstance(backend, Ours):
        pytest.skip("only our back-end keeps it")
    guest = boot(Disk(backend.socket, reconnect=True))
    guest.run("echo 'write through' >/sys/block/vda/cache_type")
    assert not writeback(backend)
    if how == "killed":
        backend.kill()
    else:
        backend.stop()
    backend.restart()
    guest.run("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct")
    assert not writeback(backend)
    assert guest.run("cat /sys/block/vda/cache_type").strip() == "write through"
    guest.run("echo 'write back' >/sys/block/vda/cache_type")
    assert writeback(backend)


def writeback(backend: Ours) -> object:
    with ControlClient(f"{backend.socket}.ctl") as control:
        return control.call("disk.info")["writeback"]
