"""What a back-end costs beside its requests: start-up, processor time while idle, memory. Touches: /proc, a connection.

Memory is the resident memory of the process (Rss in /proc/PID/smaps, of every mapping) less that of the mappings of the
guest's memory, which the client made with memfd_create(2), and of the image: those pages are the page cache's, whoever
maps them. How much of the image is mapped is told beside it.
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


def resident(smaps: str, image: str) -> tuple[int, int]:
    """Bytes of ``smaps`` that are resident: those of neither memory files nor the image, and those of the image."""
    own, of_image, name = 0, 0, ""
    for line in smaps.splitlines():
        if found := FIRST_LINE.match(line):
            name = found[1]
        elif line.startswith("Rss:") and name == image:
            of_image += int(line.split()[1]) * 1024
        elif line.startswith("Rss:") and not name.startswith("/memfd:"):
            own += int(line.split()[1]) * 1024
    return own, of_image


def measure(offer: Offer, image: Path, directory: Path, *, rounds: int, idle_s: float) -> list[Figure]:
    """Start every back-end ``rounds`` times, and watch each for ``idle_s`` seconds while a client is connected and has
    asked for something before. Raises `Failed`."""
    names = offer.names(CASE)
    starts: dict[str, list[float]] = {name: [] for name in names}
    idle: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    mapped: dict[str, list[float]] = {name: [] for name in names}
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
                    own, of_image = resident(Path(f"/proc/{server.pid}/smaps").read_text(), str(image))
                    memory[name].append(own / 2**20)
                    mapped[name].append(of_image / 2**20)
    return [
        Figure("start-up", "exec to listening", "ms", starts),
        Figure("idle", "processor time of an idle, connected disk", "µs/s", idle),
        Figure("memory", "resident memory besides the guest's and the image's", "MiB", memory),
        Figure("mapped", "pages of the image, those of the page cache, that are mapped", "MiB", mapped),
    ]
