"""What the dirty log of a live migration costs, as ratios of one run: ``python -m benchmarks.migration``.

One back-end; what the front-end of `benchmarks.loads` writes is logged or not. The variants take turns, forwards and
backwards, and each turn gives ratios to the plain variant of that turn, as `benchmarks.survival` does. While a log is
on it is read and cleared every 100 ms. With ``--other PYTHON``, the interpreter of an environment with another build,
that build is one more variant, without a log: one from before there was a dirty log shows what the branch costs while
it is off. Touches: processes, a directory in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.loads import ARENA, GIB, Load, served, started
from benchmarks.survival import COLUMNS, PLAIN, Run, ratios, text, turns

from vhostuser._native import DirtyLog
from vhostuser.bench.load import process_cpu_s

DEPTHS = (1, 32, 128)
ON, ENDED, OTHER = "log on", "log ended", "other build"
READ_EVERY_S = 0.1
PAGE = 4096


@contextmanager
def read_often(log: DirtyLog | None) -> Iterator[list[bool]]:
    """Read and clear the log all the time, as a hypervisor does that migrates its guest; at the end there is a list of
    whether anything was in it, each time."""
    found: list[bool] = []
    if log is None:
        yield found
        return
    over = threading.Event()

    def read() -> None:
        while not over.wait(READ_EVERY_S):
            found.append(any(log.take()))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield found
    finally:
        over.set()
        reader.join()
        found.append(any(log.take()))


def run_once(place: str, depth: int, seconds: float, read_share: float, *, logged: bool, ended: bool = False) -> Run:
    """4 KiB at random places. ``ended``: there was a log, and there is none any more."""
    log = DirtyLog.create(ARENA // PAGE // 8) if logged else None
    with started(place, log=log, end_log=ended) as (begin, pid), read_often(log) as found:
        before = process_cpu_s(pid)
        result = begin(Load("", PAGE, depth, read_share), seconds)
        after = process_cpu_s(pid)
    if any(found) is not (logged and not ended):
        raise SystemExit("benchmarks: the log does not say what it should")
    if result.errors or before is None or after is None:
        raise SystemExit(f"benchmarks: {result.errors} requests failed, or the back-end ended")
    requests = sum(count for _, count in [*result.reads, *result.writes])
    return Run(requests / result.elapsed_s, 1e6 * (after - before) / requests)


def main() -> int:
    """Prints a table, and writes all ratios where ``--json`` says."""
    parser = argparse.ArgumentParser(prog="benchmarks.migration", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="per run")
    parser.add_argument("--rounds", type=int, default=15, help="how often the variants take turns")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--other", metavar="PYTHON", help="the interpreter of another build, to compare with")
    options = parser.parse_args()
    kept: list[dict[str, object]] = []
    directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vhu-", dir=directory) as name:
        image = Path(name) / "disk.img"
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, GIB)
        names = [PLAIN, ON, ENDED] + [OTHER] * bool(options.other)
        print(f"{'reads':32} {'plain':>13} " + " ".join(f"{name:>26}" for name in names[1:]))
        for disk in ("null:size=1G", "memory:size=1G", str(image)):
            title = "file in memory" if disk == str(image) else disk.partition(":")[0]
            unlocked = ("--no-lock",) if disk == str(image) else ()  # both serve it, one at a time
            with ExitStack() as stack:
                place = stack.enter_context(served(disk, Path(name), *unlocked))
                runs = {
                    PLAIN: partial(run_once, place, logged=False),
                    ON: partial(run_once, place, logged=True),
                    ENDED: partial(run_once, place, logged=True, ended=True),
                }
                if options.other:
                    (Path(name) / "other").mkdir(exist_ok=True)
                    other = stack.enter_context(served(disk, Path(name) / "other", *unlocked, python=options.other))
                    runs[OTHER] = partial(run_once, other, logged=False)
                for depth in DEPTHS:
                    found = turns(
                        {name: partial(run, depth, options.seconds, 1.0) for name, run in runs.items()}, options.rounds
                    )
                    rows = {name: list(map(asdict, of)) for name, of in found.items()}
                    kept.append({"disk": title, "depth": depth, "runs": rows})
                    for what, unit, value in COLUMNS:
                        plain = median(map(value, found[PLAIN]))
                        cells = " ".join(f"{text(ratios(found, name, value)):>26}" for name in names[1:])
                        print(f"{f'{title}, {depth} at a time':32} {plain:10,.{unit}f} {what} {cells}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
