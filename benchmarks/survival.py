"""What surviving costs: in-flight tracking and the sandbox, as ratios of one run: ``python -m benchmarks.survival``.

Two back-ends serve the same kind of disk, one with and one without the sandbox; `benchmarks.loads` has its requests
tracked or not. The four variants take turns, forwards and backwards, and each turn gives the ratios to the
plain variant of that turn, so that what the machine does besides falls on all. Medians, with the interval that holds
the median of all that there could be (sign test). Touches: processes, a directory in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.loads import GIB, Load, served, started

from vhostuser.bench.compare import median_interval
from vhostuser.bench.load import process_cpu_s

DEPTHS = (1, 32, 128)
PLAIN = "plain"
VARIANTS = {  # name: sandboxed, tracked
    PLAIN: (False, False),
    "tracking": (False, True),
    "sandbox": (True, False),
    "both": (True, True),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What one variant did in one turn."""

    per_s: float
    cpu_us: float
    """Processor time of the back-end per request: what else the machine does hardly shows in it."""


def run_once(place: str, depth: int, seconds: float, *, tracked: bool) -> Run:
    """4 KiB at random places, half of them reads."""
    with started(place, tracked=tracked) as (begin, pid):
        before = process_cpu_s(pid)
        result = begin(Load("", 4096, depth, 0.5), seconds)
        after = process_cpu_s(pid)
    if result.errors or before is None or after is None:
        raise SystemExit(f"benchmarks: {result.errors} requests failed, or the back-end ended")
    requests = sum(count for _, count in [*result.reads, *result.writes])
    return Run(requests / result.elapsed_s, 1e6 * (after - before) / requests)


def turns(runs: Mapping[str, Callable[[], Run]], count: int) -> dict[str, list[Run]]:
    """Let the variants take turns ``count`` times, every second time backwards."""
    found: dict[str, list[Run]] = {name: [] for name in runs}
    for number in range(count):
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            found[name].append(runs[name]())
    return found


def ratios(found: dict[str, list[Run]], name: str, value: Callable[[Run], float]) -> list[float]:
    """Of a variant to the plain one, turn by turn."""
    return [value(run) / value(plain) for run, plain in zip(found[name], found[PLAIN], strict=True)]


def text(values: list[float]) -> str:
    """Ratios for people: the change in per cent and its interval."""
    found = median_interval(values)
    low, middle, high = (f"{100 * (ratio - 1):+.1f}" for ratio in (found.low, found.median, found.high))
    return f"{middle} % ({low} to {high})"


COLUMNS: tuple[tuple[str, int, Callable[[Run], float]], ...] = (
    ("/s", 0, lambda run: run.per_s),
    ("us", 2, lambda run: run.cpu_us),
)
"""What is shown: requests per second, and microseconds of the back-end's processor time per request."""


def main() -> int:
    """Prints a table, and writes all ratios where ``--json`` says."""
    parser = argparse.ArgumentParser(prog="benchmarks.survival", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="per run")
    parser.add_argument("--rounds", type=int, default=15, help="how often the variants take turns")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    kept: list[dict[str, object]] = []
    directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vhu-", dir=directory) as name:
        image = Path(name) / "disk.img"
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, GIB)
        print(f"{'':26} {'plain':>13} {'tracking':>26} {'sandbox':>26} {'both':>26}")
        for disk in ("null:size=1G", "memory:size=1G", str(image)):
            title = "file in memory" if disk == str(image) else disk.partition(":")[0]
            with ExitStack() as stack:
                unlocked = ("--no-lock",) if disk == str(image) else ()  # both serve it, one at a time
                places = {
                    False: stack.enter_context(served(disk, Path(name), "--no-sandbox", *unlocked)),
                    True: stack.enter_context(served(disk, Path(name), *unlocked)),
                }
                for depth in DEPTHS:
                    runs = {
                        variant: partial(run_once, places[boxed], depth, options.seconds, tracked=tracked)
                        for variant, (boxed, tracked) in VARIANTS.items()
                    }
                    found = turns(runs, options.rounds)
                    kept.append(
                        {"disk": title, "depth": depth, "runs": {n: list(map(asdict, r)) for n, r in found.items()}}
                    )
                    for what, unit, value in COLUMNS:
                        plain = median(map(value, found[PLAIN]))
                        cells = " ".join(
                            f"{text(ratios(found, name, value)):>26}" for name in VARIANTS if name != PLAIN
                        )
                        print(f"{f'{title}, {depth} at a time':26} {plain:10,.{unit}f} {what} {cells}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
