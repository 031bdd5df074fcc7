"""How long a served disk is away when its program starts, restarts or is upgraded: ``python -m benchmarks.restart``.

Medians of several runs on an image of 1 GiB. The guest is this process: one ring with an in-flight region, one write at
a time, and a new attempt every millisecond when nobody listens. Touches: processes, a temporary directory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from benchmarks.startup import compile_package
from tests.cli.guest import RETRY_S, Guest

GIB = 1 << 30
BEFORE = AFTER = 200
"""Answers that have to come before and after what is measured."""

Process = subprocess.Popen[bytes]


class Bench:
    """One image, one socket, one program after another."""

    def __init__(self, directory: Path, options: list[str]) -> None:
        self.image = directory / "disk.img"
        self.place = directory / "disk.sock"
        self.options = options
        with self.image.open("wb") as file:
            file.truncate(GIB)

    def start(self, *more: str) -> Process:
        """`vhostuser serve`, as the installed program starts it."""
        program = Path(sys.executable).with_name("vhostuser")
        words = [str(program), "serve", str(self.image), "--socket", str(self.place), "--queues", "1"]
        return subprocess.Popen([*words, *self.options, *more], stderr=subprocess.DEVNULL)

    def guest(self) -> Guest:
        """A guest, as soon as somebody listens."""
        while True:
            try:
                return Guest(self.place)
            except OSError:
                time.sleep(RETRY_S)

    def begin(self) -> float:
        """From fork and exec to the first connection that is served."""
        begun = time.monotonic()
        process = self.start()
        guest = self.guest()
        taken = time.monotonic() - begun
        guest.close()
        process.terminate()
        process.wait()
        return taken

    def gap(self, replace: Callable[[Process], Process]) -> float:
        """The longest time without an answer while one program takes the place of another."""
        process = self.start()
        replaced = threading.Event()
        answers: list[float] = []

        def run() -> None:
            nonlocal process
            process = replace(process)
            replaced.set()

        thread = threading.Thread(target=run)
        with self.guest() as guest:
            connections = 1
            left = AFTER
            while left:
                connections += one_write(guest)
                answers.append(time.monotonic())
                if len(answers) == BEFORE:
                    thread.start()
                left -= connections > 1 and replaced.is_set()
        thread.join()
        process.terminate()
        process.wait()
        return max(after - before for before, after in pairwise(answers))


def one_write(guest: Guest) -> int:
    """Write, and return how often the connection had to be made again until the answer came."""
    guest.write(0, 1)
    return guest.answered_by_anyone(1)


def killed(bench: Bench, process: Process) -> Process:
    """SIGKILL, and start at once, as a service manager does."""
    process.kill()
    successor = bench.start()
    process.wait()
    return successor


def restarted(bench: Bench, process: Process) -> Process:
    """SIGTERM, and start when it has ended."""
    process.terminate()
    process.wait()
    return bench.start()


def upgraded(bench: Bench, process: Process) -> Process:
    """Start a successor, and wait for the end of the other."""
    successor = bench.start("--upgrade")
    process.wait()
    return successor


def main() -> None:
    """Prints one line per number."""
    parser = argparse.ArgumentParser(prog="benchmarks.restart", description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("options", nargs="*", help="for vhostuser serve, after --")
    wanted = parser.parse_args()
    compile_package()
    with tempfile.TemporaryDirectory(prefix="vhu-") as name:
        bench = Bench(Path(name), wanted.options)
        cases: dict[str, Callable[[], float]] = {
            "exec to the first connection served": bench.begin,
            "SIGKILL and start: longest time without an answer": lambda: bench.gap(lambda one: killed(bench, one)),
            "SIGTERM and start: longest time without an answer": lambda: bench.gap(lambda one: restarted(bench, one)),
            "--upgrade: longest time without an answer": lambda: bench.gap(lambda one: upgraded(bench, one)),
        }
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, {wanted.runs} runs each")
        for text, measure in cases.items():
            times = sorted(measure() for _ in range(wanted.runs))
            middle, least, most = (1000 * one for one in (statistics.median(times), times[0], times[-1]))
            print(f"{text:52} median {middle:6.0f} ms, {least:.0f} to {most:.0f}")


if __name__ == "__main__":
    main()
