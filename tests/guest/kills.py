"""Back-ends that are killed where they stand, again and again, and started again as a service manager would.

Touches: processes, their in-flight regions through /proc.
"""

from __future__ import annotations

import json
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from .backends import Ours
from .processes import ChildError, Deadline, readable

CONNECT_S: Final = 30.0
POLL_S: Final = 0.004
DELAYS_S: Final = (0.004, 0.04, 0.2, 0.7)
"""A kill comes at a random moment below one of these after the front-end has come back: while rings are set up, while
requests are served again, in the middle of things."""
EARLY_S: Final = 0.4
EARLY_SHARE: Final = 1 / 8
"""So many of the kills come after a random time below `EARLY_S` from the start, front-end or not."""

REGION_NAME: Final = "/memfd:vhostuser-inflight"
HEAD: Final = struct.Struct("=QHHHH")
ENTRY: Final = struct.Struct("=B5xHQ")
ALIGN: Final = 64


@dataclass(slots=True)
class Tally:
    """What the kills of one back-end did."""

    kills: int = 0  # of a back-end that a front-end was connected to
    early: int = 0  # before the front-end had come back
    with_requests: int = 0  # kills that left requests in flight
    requests: int = 0  # requests that they left
    most: int = 0  # requests that one kill left
    starts_s: list[float] = field(default_factory=list)  # from the start of a process to its readiness
    outages_s: list[float] = field(default_factory=list)  # from a kill to the front-end's next connection

    def note(self, left: int) -> None:
        """A kill left so many requests in flight."""
        self.with_requests += left > 0
        self.requests += left
        self.most = max(self.most, left)

    def summary(self) -> dict[str, float]:
        """The numbers that are worth keeping."""
        return {
            "kills": self.kills,
            "early": self.early,
            "with_requests": self.with_requests,
            "requests": self.requests,
            "most": self.most,
            "start_s": round(median(self.starts_s), 2),
            "outage_s": round(median(self.outages_s), 2),
            "longest_outage_s": round(max(self.outages_s), 2),
        }


def kill_often(
    backend: Ours,
    kills: int,
    seed: int,
    stop: threading.Event,
    *,
    started: bool = False,
    delays_s: tuple[float, ...] = DELAYS_S,
) -> Tally:
    """Kill ``backend`` at ``kills`` random moments at which it serves, and some more at which it does not yet.

    ``started``: only while rings run. QEMU 7.2 forgets to listen to a connection that comes after one that was lost
    before the device was started: it connects again, and never says a word.
    Returns once a front-end has come back after the last one, and soon after ``stop`` was set. Raises `ChildError` when
    none comes back, or the back-end ends by itself. The back-end belongs to the calling thread: it ends when that does.
    """
    drawn = random.Random(seed)
    tally = Tally()
    seen = backend.connections() - 1
    killed = time.monotonic()
    while not stop.is_set():
        if not tally.kills or started or drawn.random() >= EARLY_SHARE or tally.kills == kills:
            wait_connection(backend, seen, stop)
            if tally.kills:
                tally.outages_s.append(time.monotonic() - killed)
            if tally.kills == kills:
                return tally
            delay = drawn.uniform(0, drawn.choice(delays_s))
        else:
            delay = drawn.uniform(0, EARLY_S)
        pause(backend, delay)
        with ExitStack() as stack:
            regions = stack.enter_context(in_flight_of(backend))
            while started and not regions and not stop.is_set():
                pause(backend, POLL_S)
                regions = stack.enter_context(in_flight_of(backend))
            backend.kill()
            killed = time.monotonic()
            tally.note(sum(map(marked, regions)))
        tally.kills += backend.connections() > seen
        tally.early += backend.connections() == seen
        seen = backend.connections()
        backend.restart()
        tally.starts_s.append(time.monotonic() - killed)
    return tally


def wait_connection(backend: Ours, seen: int, stop: threading.Event) -> None:
    """Wait until more than ``seen`` front-ends have connected since the first start of ``backend``."""
    deadline = Deadline(CONNECT_S)
    while backend.connections() <= seen and not stop.is_set():
        if not deadline.left_s:
            raise ChildError(f"no front-end comes back to {backend.socket}: {backend.process.tail()}")
        pause(backend, POLL_S)


def pause(backend: Ours, seconds: float) -> None:
    """Let ``backend`` work for a while; raises `ChildError` when it ends."""
    if readable([backend.process], seconds):
        raise ChildError(f"{backend.process.name} ended by itself: {backend.process.tail()}")


@contextmanager
def in_flight_of(backend: Ours) -> Iterator[list[int]]:
    """Descriptors of the in-flight regions that ``backend`` has open, good for longer than it lives."""
    directory = Path(f"/proc/{backend.process.pid}/fd")
    with ExitStack() as stack:
        regions: dict[int, int] = {}
        for entry in directory.iterdir():
            try:
                if os.readlink(entry).startswith(REGION_NAME):
                    fd = os.open(entry, os.O_RDONLY)
                    stack.callback(os.close, fd)
                    regions.setdefault(os.fstat(fd).st_ino, fd)
            except FileNotFoundError:
                continue  # closed meanwhile
        yield list(regions.values())


def marked(region: int) -> int:
    """Requests in flight as the file of a region for split rings says (vhost-user: Inflight I/O tracking)."""
    content = os.pread(region, os.fstat(region).st_size, 0)
    largest = HEAD.unpack_from(content)[2]
    if not largest:
        return 0  # no ring has started with it
    stride = -(-(HEAD.size + largest * ENTRY.size) // ALIGN) * ALIGN
    parts = [content[at : at + stride] for at in range(0, len(content) - stride + 1, stride)]
    return sum(
        ENTRY.unpack_from(part, HEAD.size + number * ENTRY.size)[0] != 0
        for part in parts
        if HEAD.unpack_from(part)[2] == largest
        for number in range(largest)
    )


def keep(path: Path, name: str, rows: dict[str, dict[str, float]]) -> None:
    """Add what a test saw to the JSON file ``path``, under its name."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found | {name: rows}, indent=1, sort_keys=True) + "\n")
