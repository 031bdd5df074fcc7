"""A disk that nobody uses costs nothing."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.backend.frontend import WAIT_S, Frontend, GuestRam, GuestRing

OK, IN = 0, 0
TICK_NS = 10_000_000


def busy_ns(pid: int) -> int:
    """How long all threads of a process have run, in nanoseconds: ticks are charged by chance to a short wake-up."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


@pytest.mark.parametrize(
    "seconds", [2, pytest.param(60, marks=pytest.mark.guest)], ids=lambda seconds: f"{seconds} seconds"
)
@pytest.mark.parametrize("engine", ["io_uring", "syscalls"])
def test_a_connected_quiet_disk_takes_no_processor_time(tmp_path: Path, engine: str, seconds: int) -> None:
    image, where = tmp_path / "disk.img", tmp_path / "disk.sock"
    image.write_bytes(bytes(1 << 20))
    command = [sys.executable, "-m", "vhostuser.cli.main", "serve", str(image), "--socket", str(where), "--queues", "4"]
    server = subprocess.Popen([*command, "--engine", engine], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        while "serving" not in server.stderr.readline():
            assert server.poll() is None
        with Frontend.connect(str(where)) as peer:
            features = peer.negotiate()
            ram = GuestRam()
            ram.share(peer)
            rings = [GuestRing(ram, index, 64, features) for index in range(4)]
            for ring in rings:
                ring.start(peer)
                assert ring.request(IN, 0, room=4096)[0] == OK
            peer.barrier()
            for call in select.select([ring.call for ring in rings], [], [], 0)[0]:
                os.eventfd_read(call)
            before = busy_ns(server.pid)
            # Nothing may come from the back-end meanwhile: the wait is the measurement.
            assert select.select([ring.call for ring in rings], [], [], seconds)[0] == []
            assert busy_ns(server.pid) - before < TICK_NS
            for ring in rings:
                ring.close()
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0
        server.stderr.close()
