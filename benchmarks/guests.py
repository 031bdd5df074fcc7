"""One load in a real guest: reads of 4 KiB, one at a time, from a disk of each back-end. Touches: QEMU, sockets.

The guest's own clock times it (`dd` says how long it took), so that the shell between here and there is not measured.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks.cases import Case
from benchmarks.results import Outcome, Sample
from benchmarks.servers import Failed, Offer, Server
from tests.guest.machines import Disk, Guest
from tests.guest.prepare import Qemu, machine, machine_ready, present
from tests.guest.processes import ChildError
from tests.guest.streams import CommandError

from vhostuser.bench.load import process_cpu_s

READS: Final = 4000
NAME: Final = "guest/read-4k-d1"
CASE: Final = Case("tmpfs", "read", 1)
WITHOUT_VM: Final = (
    "tests with a client on this machine have no virtual machine, hence no exits, no interrupts and no guest's kernel; "
    "a guest adds these to the requests of every back-end"
)


def available() -> Qemu | None:
    """The newest QEMU that a guest can be booted with; None without one, or without a kernel."""
    found = present() if machine_ready() else []
    return found[-1] if found else None


def measure(qemu: Qemu, offer: Offer, core: int, image: Path, directory: Path, rounds: int) -> Outcome:
    """Boot one guest with a disk of each back-end, on processor ``core``, and let them take turns. Raises `Failed`."""
    names = offer.names(CASE)
    allowed = os.sched_getaffinity(0)
    with ExitStack() as stack:
        servers = {name: stack.enter_context(offer.serve(name, CASE, image, directory)) for name in names}
        disks = [Disk(servers[name].socket, f"d{number}") for number, name in enumerate(names)]
        try:
            os.sched_setaffinity(0, {core})
            guest = stack.enter_context(Guest(qemu, machine(), directory, disks))
        finally:
            os.sched_setaffinity(0, allowed)
        try:
            guest.wait_ready()
            samples = _turns(guest, servers, rounds)
        except (ChildError, CommandError) as error:
            raise Failed(f"{NAME}: {error}") from None
    commands = {name: server.command for name, server in servers.items()}
    commands["client"] = f"QEMU {qemu.name} (TCG): {_script('vda')}"
    return Outcome(NAME, "in a guest (TCG): 4 KiB sequential read, 1 at a time", samples, commands, os.getloadavg()[0])


def _turns(guest: Guest, servers: Mapping[str, Server], rounds: int) -> dict[str, Sequence[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        for (name, server), letter in zip(servers.items(), "abc", strict=False):
            before = process_cpu_s(server.pid)
            said = guest.run(_script(f"vd{letter}"))
            after = process_cpu_s(server.pid)
            if number and before is not None and after is not None:  # the first round warms up
                samples[name].append(Sample(READS / seconds_of(said), (after - before) * 1e6 / READS))
    return dict(samples)


def _script(device: str) -> str:
    return f"dd if=/dev/{device} of=/dev/null bs=4k iflag=direct count={READS} 2>&1"


def seconds_of(said: str) -> float:
    """How long `dd` took, as it says itself. Raises `Failed` when it read less than it should have."""
    found = re.search(r"copied, ([0-9.e-]+) s", said)
    if found is None or f"{READS}+0 records in" not in said:
        raise Failed(f"{NAME}: {said.strip()[-300:]}")
    return float(found[1])
