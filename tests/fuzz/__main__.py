"""Builds and runs the fuzz targets: `python -m tests.fuzz [--seconds N] [--jobs N] [TARGET...]`; `make fuzz`.

`ring`, `request`, `inflight` and `address` are native (`native/fuzz`), with AddressSanitizer; `connection` and
`session` are Python. Every target gets so many seconds of processor time. Inputs that reach something new are kept
below `build/fuzz` and used again. Exits with 1 when a target found something.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.fuzz.seeds import seeds_of, write_seeds

ROOT: Final = Path(__file__).resolve().parent.parent.parent
CRATE: Final = ROOT / "native/fuzz"
BUILD: Final = ROOT / "build/fuzz"
NATIVE: Final = ("ring", "request", "inflight", "address")
PYTHON: Final = ("connection", "session")
TRIPLE: Final = "x86_64-unknown-linux-gnu"
MAX_SEEDS: Final = 60
SMALL: Final = 300

COVERAGE: Final = (
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
)

OPTIONS: Final = (
    *("-max_len=8192", "-len_control=0", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"),
    "-handle_bus=0",  # what lies behind a truncated file is ours to handle
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="of processor time, for each target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument(
        "--keep", action="store_true", help="make the seeds in the tree anew from what was found so far"
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NATIVE + PYTHON))
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(NATIVE + PYTHON)
    if unknown:
        parser.error(f"no target is called {', '.join(sorted(unknown))}")
    targets = arguments.targets or [*NATIVE, *PYTHON]
    if arguments.keep:
        for target in targets:
            keep(target)
        return 0
    if set(targets) & set(NATIVE):
        build()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return 1 - all(list(pool.map(lambda target: run(target, arguments.seconds), targets)))


def build() -> None:
    """The native targets, instrumented. The stable compiler has what that takes, but has to be told that we mean it."""
    flags = [*COVERAGE, "--cfg", "fuzzing", "-Zsanitizer=address", "-Ccodegen-units=1"]
    environment = {**os.environ, "RUSTC_BOOTSTRAP": "1", "RUSTFLAGS": " ".join(flags)}
    command = ["cargo", "build", "--quiet", "--locked", "--release", "--target", TRIPLE]
    if subprocess.run(command, cwd=CRATE, env=environment, check=False).returncode:
        sys.exit("vhostuser: native/fuzz: the targets do not build. A C++ compiler is needed: install g++.")


def command_of(target: str) -> list[str]:
    """What runs a target; options of libFuzzer follow."""
    if target in NATIVE:
        return [str(CRATE / "target" / TRIPLE / "release" / target), *OPTIONS]
    return [sys.executable, "-m", "tests.fuzz.play", target, *OPTIONS]


def corpus_of(target: str) -> Path:
    """Where the inputs of a target are kept; the seeds are there."""
    corpus = BUILD / target / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in seeds_of(target):
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    return corpus


def run(target: str, seconds: int) -> bool:
    """Runs a target; False when it found something."""
    corpus, log = corpus_of(target), BUILD / target / "log"
    command = [*command_of(target), f"-artifact_prefix={BUILD / target}/", str(corpus)]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        over = threading.Event()
        watch = threading.Thread(target=end_after, args=(process.pid, seconds, over))
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        over.set()
        watch.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    executions = re.findall(r"number_of_executed_units: (\d+)", text) or ["0"]
    covered = re.findall(r"cov: (\d+)", text) or ["0"]
    if process.returncode:
        kept = re.findall(r"Test unit written to (\S+)", text) or ["none"]
        print(f"vhostuser: fuzz target {target}: it found something. See {log}; the input is {kept[-1]}.")
        return False
    used = usage.ru_utime + usage.ru_stime
    print(
        f"{target}: {int(executions[-1]):,} executions, {int(covered[-1]):,} edges, {used:.0f} s of processor time, "
        "nothing found",
        flush=True,
    )
    return True


def end_after(pid: int, seconds: float, over: threading.Event) -> None:
    """Asks a process to end once it has used so much processor time."""
    while not over.wait(1.0):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended by itself
            return
        if (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") >= seconds:
            os.kill(pid, signal.SIGUSR1)
            return


def keep(target: str) -> None:
    """Makes seeds of some small inputs, of all sizes up to a limit."""
    inputs = sorted((path.read_bytes() for path in corpus_of(target).iterdir()), key=len)
    small = [data for data in inputs if len(data) <= SMALL]
    write_seeds(target, [small[number * len(small) // MAX_SEEDS] for number in range(min(MAX_SEEDS, len(small)))])


if __name__ == "__main__":
    sys.exit(main())
