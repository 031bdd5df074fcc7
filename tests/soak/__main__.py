"""The soak run: ``python -m tests.soak --seconds 3600 --json FILE``.

Six back-ends, both engines, on a moderate load: four driven by our own client, two by a guest. Three of them are killed
with SIGKILL every few seconds and started again. Meanwhile front-ends leave and die, sizes change, write caches are
switched, statistics are asked for. What is read is compared with what was written, and memory, descriptors and threads
are watched. Ends with 1 when anything was wrong or is not flat. Touches processes and a directory of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.guest.backends import Export, Ours
from tests.guest.images import MIB, blank
from tests.guest.kills import Tally, in_flight_of, marked
from tests.guest.machines import RECONNECT_MS_SINCE, Disk
from tests.guest.prepare import machine, machine_ready, present
from tests.soak.driving import SIZE, Driver
from tests.soak.guests import GuestLoad
from tests.soak.watching import Watch

from vhostuser.control import ControlClient
from vhostuser.errors import VhostUserError

KILL_EVERY_S: Final = (2.0, 16.0)
RESIZE_EVERY_S: Final = 9.0
ASK_EVERY_S: Final = 1.0
TELL_EVERY_S: Final = 60.0
END_S: Final = 300.0
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8
TROUBLE: Final = re.compile(r"Traceback|panicked|broken|our own")
Job = Callable[[threading.Event], None]


class Soak:
    """Everything of one run."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self.place = place
        self.stack = stack
        self.stop = threading.Event()
        self.pool = stack.enter_context(ThreadPoolExecutor(max_workers=24))  # outlives what its threads start
        self.backends: dict[str, Ours] = {}
        self.counts: Counter[str] = Counter()
        self.tallies: dict[str, Tally] = {}
        self.drivers: list[Driver] = []
        self.jobs: list[Job] = []
        self.guest: GuestLoad | None = None
        self.watch = Watch()
        self.watch.add("front-ends", os.getpid, lasting=True)

    def backend(self, name: str, *, dies: bool, **export: object) -> Ours:
        """A served image; one that ``dies`` gets a killer."""
        backend = Ours(blank(self.place / f"{name}.img", 2 * SIZE), self.place, Export(**export))  # type: ignore[arg-type]
        self.stack.enter_context(backend)
        self.backends[name] = backend
        self.watch.add(name, lambda: backend.process.pid, lasting=not dies)
        if dies:
            tally = self.tallies[name] = Tally()
            self.jobs.append(lambda stop: self._kill(backend, tally, len(name), stop))
        return backend

    def build(self, seed: int) -> None:
        """The back-ends and what loads them."""
        plain = {"lasting-uring": "io_uring", "lasting-calls": "syscalls"}
        for name, engine in plain.items():
            backend = self.backend(name, dies=False, engine=engine, queues=2)
            self.drivers.append(Driver(name, backend, dies=False, seed=seed))
            self.jobs.append(lambda stop, backend=backend: self._resize(backend, stop))  # type: ignore[misc]
        slow = "delay-read=3ms,delay-write=4ms,delay-flush=6ms"
        killed: dict[str, dict[str, object]] = {
            "killed-uring": {"engine": "io_uring"},
            "killed-calls": {"engine": "syscalls", "inject": slow},
        }
        for name, export in killed.items():
            backend = self.backend(name, dies=True, queues=2, **export)
            self.drivers.append(Driver(name, backend, dies=True, seed=seed))
        self.jobs += [driver.run for driver in self.drivers]
        self._build_guest(seed)
        self.jobs += [self._ask, self.watch.run]

    def _build_guest(self, seed: int) -> None:
        found = [qemu for qemu in present() if machine_ready() and qemu.version >= RECONNECT_MS_SINCE]
        if not found:
            print("soak: no guest takes part: no QEMU from 9.2 on is here. Run `make packages`", file=sys.stderr)
            return
        disks = []
        for name, dies, export in (
            ("guest-lasting", False, {"engine": "io_uring", "queues": 2}),
            ("guest-killed", True, {"engine": "syscalls", "queues": 1}),
        ):
            backend = self.backend(name, dies=dies, **export)
            disk = Disk(backend.socket, f"d{len(disks)}", {"num-queues": export["queues"]}, reconnect=True)  # type: ignore[dict-item]
            disks.append((disk, Path(backend.image)))
        self.jobs.append(lambda stop: self._resize(self.backends["guest-lasting"], stop))
        self.guest = GuestLoad(found[0], machine(), self.place, disks, seed)
        self.watch.add("QEMU", lambda: self.guest.guest.process.pid if self.guest else 0, lasting=False)
        self.jobs.append(self.guest.run)

    def run(self, seconds: float, tell: Callable[[dict[str, object]], None]) -> list[str]:
        """Until the time is over or a job failed; returns what was wrong. ``tell`` hears now and then how it stands."""
        began = time.monotonic()
        futures = [self.pool.submit(self._guarded, job) for job in self.jobs]
        while (left := began + seconds - time.monotonic()) > 0:
            if any(future.done() for future in wait(futures, min(left, TELL_EVERY_S), FIRST_EXCEPTION).done):
                break
            self.counts["seconds"] = int(time.monotonic() - began)
            tell(self.report([]))
        self.stop.set()
        wait(futures, END_S)
        self.counts["seconds"] = int(time.monotonic() - began)
        return [self._outcome(future) for future in futures if not future.done() or future.exception()]

    @staticmethod
    def _outcome(future: Future[None]) -> str:
        if not future.done():
            return "a part of the run does not end"
        error = future.exception()
        return f"{type(error).__name__}: {error}"

    def _guarded(self, job: Job) -> None:
        try:
            job(self.stop)
        except BaseException as error:
            if self.stop.is_set() and isinstance(error, VhostUserError):
                return  # the other jobs have ended already
            raise

    def _kill(self, backend: Ours, tally: Tally, seed: int, stop: threading.Event) -> None:
        drawn = random.Random(seed)
        while not stop.wait(drawn.uniform(*KILL_EVERY_S)):
            assert backend.process.alive, backend.process.tail()
            began = time.monotonic()
            with in_flight_of(backend) as regions:
                backend.kill()
                tally.note(sum(map(marked, regions)))
            tally.kills += 1
            backend.restart()
            tally.starts_s.append(time.monotonic() - began)

    def _resize(self, backend: Ours, stop: threading.Event) -> None:
        drawn = random.Random(7)
        while not stop.wait(RESIZE_EVERY_S):
            with ControlClient(f"{backend.socket}.ctl") as control:
                control.call("disk.resize", size=SIZE + drawn.randint(0, 32) * MIB)
            self.counts["resizes"] += 1

    def _ask(self, stop: threading.Event) -> None:
        while not stop.wait(ASK_EVERY_S):
            for name, backend in self.backends.items():
                try:
                    with ControlClient(f"{backend.socket}.ctl") as control:
                        for method in ("disk.stats", "disk.info", "disk.requests"):
                            control.call(method)
                    self.counts["calls"] += 3
                except (VhostUserError, OSError):
                    if name not in self.tallies:
                        raise

    def report(self, wrong: list[str]) -> dict[str, object]:
        """All numbers, ready for JSON; adds to ``wrong`` what is not flat and what back-ends complained of."""
        for series in self.watch.series:
            wrong += series.growth() if series.name != "QEMU" else []
        for name, backend in self.backends.items():
            said = backend.log.read_text(errors="replace")
            wrong += [f"{name}: {line}" for line in said.splitlines() if TROUBLE.search(line)][:5]
        counts = Counter(self.counts)
        for part in [*self.drivers, *([self.guest] if self.guest else [])]:
            counts.update(part.counts)
        counts["kills"] = sum(tally.kills for tally in self.tallies.values())
        counts["requests_left_by_kills"] = sum(tally.requests for tally in self.tallies.values())
        counts["kills_with_requests"] = sum(tally.with_requests for tally in self.tallies.values())
        counts["blocks_compared"] = sum(driver.model.checked for driver in self.drivers)
        return {
            "wrong": wrong,
            "counts": dict(counts),
            "parts": {driver.name: dict(driver.counts) for driver in self.drivers}
            | ({"guest": dict(self.guest.counts)} if self.guest else {}),
            "processes": {series.name: series.summary() for series in self.watch.series},
        }


def show(report: dict[str, object]) -> None:
    """The tables for people."""
    counts, processes = report["counts"], report["processes"]
    assert isinstance(counts, dict)
    assert isinstance(processes, dict)
    for name, count in sorted(counts.items()):
        print(f"{name.replace('_', ' '):26} {count:>12,}")
    print(f"\n{'':16} {'lives':>6} {'private KiB, slope':>30} {'descriptors':>16} {'threads':>14}")
    for name, row in processes.items():
        cells = [_cell(row[what]) for what in ("private_kib", "fds", "threads")]
        slope = row["private_kib"].get("slope_per_hour", 0)
        print(f"{name:16} {row['lives']:6} {cells[0]:>20} {slope:+8.0f}/h {cells[1]:>16} {cells[2]:>14}")
    print("numbers: first / last / largest, after the warm-up\n")


def _cell(numbers: dict[str, float]) -> str:
    return " / ".join(f"{numbers.get(key, 0):.0f}" for key in ("first", "last", "max"))


def keep(path: Path | None, report: dict[str, object]) -> None:
    """All numbers as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def measure_truly() -> None:
    """Have this process give back what it frees, so that its memory says what it uses.

    By itself glibc keeps a pool for each of many threads; buffers of changing sizes make them grow for longer than an
    hour although what is in use stays the same.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_ARENA_MAX, 1)
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 10)


def main() -> int:
    """Run, print, and return 1 when something was wrong."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    measure_truly()
    with tempfile.TemporaryDirectory(prefix="vhu-") as place, ExitStack() as stack:
        soak = Soak(Path(place), stack)
        soak.build(options.seed)
        wrong = soak.run(options.seconds, lambda report: keep(options.json, report))
        report = soak.report(wrong)
        if wrong:
            stack.pop_all()  # ends with this process, whatever hangs
            stack = ExitStack()
    show(report)
    keep(options.json, report)
    for line in wrong:
        print(f"soak: {line}", file=sys.stderr)
    sys.stdout.flush()
    if wrong:
        os._exit(1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
