"""What a back-end costs beside its requests: start-up, processor time while idle, memory. Touches: /proc, a connection.

Memory is the resident memory of the process (Rss in /proc/PID/smaps, of every mapping) less that of the mappings of the
guest's memory, which the client made with memfd_create(2).
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from benchmarks.cases import SPAN, Case
from benchmarks.results import Figure
from benchmarks.servers import Failed, Offer

from vhostuser.bench.load import PATTERNS, Load, Target, process_cpu_s

CASE = Case("tmpfs", "randread", 1)
FIRST_LINE = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


def resident_without_guest(smaps: str) -> int:
    """Bytes of ``smaps`` that are resident, those of memory files left out."""
    total, counted = 0, True
    for line in smaps.splitlines():
        if found := FIRST_LINE.match(line):
            counted = not found[1].startswith("/memfd:")
        elif line.startswith("Rss:") and counted:
            total += int(line.split()[1]) * 1024
    return total


def measure(offer: Offer, image: Path, directory: Path, *, rounds: int, idle_s: float) -> list[Figure]:
    """Start every back-end ``rounds`` times, and watch each for ``idle_s`` seconds while a client is connected and has
    asked for something before. Raises `Failed`."""
    names = offer.names(CASE)
    starts: dict[str, list[float]] = {name: [] for name in names}
    idle: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            with offer.serve(name, CASE, image, directory) as server:
                starts[name].append(server.start_s * 1000)
                if number:
                    continue
                with Target(str(server.socket), Load(PATTERNS["randread"], span=SPAN)) as target:
                    target.run(0.5)
                    time.sleep(2)  # not part of idling: the end of a poll window, and what is done once afterwards
                    before = process_cpu_s(server.pid)
                    time.sleep(idle_s)
                    after = process_cpu_s(server.pid)
                    if before is None or after is None:
                        raise Failed(f"{name}: its processor time is not known")
                    idle[name].append((after - before) * 1e6 / idle_s)
                    memory[name].append(resident_without_guest(Path(f"/proc/{server.pid}/smaps").read_text()) / 2**20)
    return [
        Figure("start-up", "exec to listening", "ms", starts),
        Figure("idle", "processor time of an idle, connected disk", "µs/s", idle),
        Figure("memory", "resident memory besides the guest's", "MiB", memory),
    ]
