"""Ours, a peer and the bare loop under the same loads, as ratios of one run: ``python -m benchmarks``.

All serve the same file, the same client drives them, they take turns, and each is pinned to a processor of its own.
docs/design/performance.md tells what is measured and why so. Touches: processes, images, files for the results.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
from benchmarks.cases import CASES, OTHERS, QEMU_IMG_DEPTHS, Case, chosen, select
from benchmarks.clients import Client, QemuImg, qemu_with_libblkio
from benchmarks.report import page
from benchmarks.results import BARE, OURS, PEER, Figure, Outcome, Report, merged
from benchmarks.rounds import Images, fill, run_case, run_qemu_img
from benchmarks.servers import DAEMON_POLL_NS, Failed, Offer, bare_loop, storage_daemon_command
from benchmarks.tables import interval_text, number_text, report_tables
from rich.console import Console
from tests.guest.packages import PROJECT
from tests.peers.daemons import Unavailable

from benchmarks import footprint, guests, machine

CONSOLE = Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="tests whose names have this")
    parser.add_argument("--list", action="store_true", help="the names of all tests")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 0.3 seconds: to see that all works")
    parser.add_argument("--rounds", type=int, help="how often the servers take turns (9)")
    parser.add_argument("--seconds", type=float, help="of each load (1)")
    parser.add_argument("--python", default=sys.executable, help="whose vhostuser serves, and drives the load")
    parser.add_argument("--serve-option", action="append", default=[], metavar="OPTION", help="for `vhostuser serve`")
    parser.add_argument(
        "--peer", metavar="COMMAND", help="with {image}, {socket} and, if it can, {queues} and {direct}"
    )
    parser.add_argument("--peer-poll-ns", type=int, default=DAEMON_POLL_NS, help="of the storage daemon's thread")
    parser.add_argument("--bare-engine", choices=("pread", "mapped"), default="pread", help="for cached files")
    parser.add_argument("--directory", type=Path, default=PROJECT / "build", help="for the image on a file system")
    parser.add_argument("--client-core", type=int, default=0)
    parser.add_argument("--server-core", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, after every test")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", default=PROJECT / "build" / "bench.html", help="the report"
    )
    parser.add_argument(
        "--merge", nargs="+", type=Path, metavar="FILE", help="only report what these --json files have"
    )
    return parser.parse_args()


def program_of(python: str) -> list[str]:
    """The command of the environment that an interpreter belongs to."""
    script = Path(python).absolute().with_name("vhostuser")
    return [str(script)] if script.exists() else [python, "-m", "vhostuser.cli.main"]


def offer_of(options: argparse.Namespace, environment: dict[str, str]) -> tuple[Offer, str, list[str]]:
    """The servers, what the peer is called, and what cannot be compared. Raises `Failed`."""
    peer, name, skipped = options.peer, options.peer or "", []
    if peer is None:
        try:
            peer, version = storage_daemon_command(options.peer_poll_ns)
            name = f"{version}, aio=io_uring, an iothread with poll-max-ns={options.peer_poll_ns}"
        except Unavailable as error:
            skipped.append(f"the peer: {error}")
    offer = Offer(
        program_of(options.python),
        bare_loop(),
        peer,
        options.server_core,
        options.serve_option,
        options.bare_engine,
        environment,
    )
    return offer, name or "none", skipped


@contextmanager
def images(directory: Path, wanted: Sequence[Case], others: bool) -> Iterator[Images]:
    """The images that the chosen tests need, filled, and removed afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="vhb-") as sockets,
        tempfile.TemporaryDirectory(prefix="vhb-", dir=memory) as fast,
        tempfile.TemporaryDirectory(prefix="vhb-", dir=directory.resolve()) as slow,
    ):
        found = Images(Path(fast) / "disk.img", Path(slow) / "disk.img", Path(sockets))
        if others or any(found.of(case) == found.in_memory and case.place != "null" for case in wanted):
            fill(found.in_memory)
        if any(found.of(case) == found.in_file_system for case in wanted):
            fill(found.in_file_system)
        yield found


def measured(options: argparse.Namespace, save: Callable[[Report], None]) -> Report:
    """Run what was chosen. After every test ``save`` gets what there is. Raises `Failed`."""
    rounds = options.rounds or (3 if options.quick else 9)
    seconds = options.seconds or (0.3 if options.quick else 1.0)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offer, peer, skipped = offer_of(options, environment)
    client = Client(offer.program, options.client_core, environment)
    cases = select(options.only)
    others = [name for name in OTHERS if chosen(name, options.only)]
    if not cases and not others:
        raise Failed(f"no test has {' or '.join(options.only)} in its name: see --list")
    facts = machine.facts(offer.program, peer)
    settings = {"rounds": str(rounds), "seconds of each load": str(seconds)}
    settings |= {"processor of the client": str(options.client_core), "of the servers": str(options.server_core)}
    outcomes: list[Outcome] = []
    figures: list[Figure] = []
    with images(options.directory, cases, bool(others)) as files:
        facts["file systems"] = f"{machine.file_system(files.in_memory.parent)} (the file in memory), "
        facts["file systems"] += f"{machine.file_system(files.in_file_system.parent)} (the other files)"
        jobs: list[Callable[[], Outcome]] = [
            partial(run_case, case, offer, client, files, rounds=rounds, seconds=seconds) for case in cases
        ]
        depths = [depth for depth in QEMU_IMG_DEPTHS if f"qemu-img/read-4k-d{depth}" in others]
        if depths and (tool := qemu_with_libblkio()):
            img = QemuImg(tool, options.client_core)
            jobs += [
                partial(run_qemu_img, depth, offer, img, files, rounds=rounds, seconds=seconds) for depth in depths
            ]
        elif depths:
            skipped.append("qemu-img: QEMU's tools with libblkio are not here: run `make interop`")
        if guests.NAME in others and (qemu := guests.available()):
            core = options.client_core
            jobs.append(partial(guests.measure, qemu, offer, core, files.in_memory, files.directory, rounds))
        elif guests.NAME in others:
            skipped.append("the guest: none can be booted here: run `make packages`")
        for job in jobs:
            outcomes.append(job())
            CONSOLE.print(progress(outcomes[-1]))
            save(Report(facts, settings, outcomes, figures, skipped))
        if "footprint" in others:
            found = footprint.measure(
                offer, files.in_memory, files.directory, rounds=rounds, idle_s=2.0 if options.quick else 10.0
            )
            figures.extend(found)
    facts["load average at the end"] = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return Report(facts, settings, outcomes, figures, skipped)


def progress(outcome: Outcome) -> str:
    """One line for a test that has just ended."""
    ratios = [f"{text} to {name}" for name in (PEER, BARE) if (text := interval_text(outcome.ratio(name)))]
    rate = number_text(outcome.middle(OURS, lambda sample: sample.per_s))
    return f"{outcome.name:40} {rate:>10}/s   {', '.join(ratios)}"


def save(place: Path | None, report: Report) -> None:
    """Writes all numbers, so that those of an interrupted run are there, too."""
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def main() -> int:
    """Measures and reports. Returns the exit status: 1 when anything failed."""
    options = arguments()
    if options.list:
        print("\n".join([*(case.name for case in CASES), *OTHERS]))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.merge:
            report = merged([msgspec.json.decode(path.read_bytes(), type=Report) for path in options.merge])
        else:
            report = measured(options, partial(save, options.json))
    except (Failed, OSError, msgspec.DecodeError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    CONSOLE.print(report_tables(report))
    CONSOLE.print(f"note: {guests.WITHOUT_VM}")
    save(options.json, report)
    options.html.parent.mkdir(parents=True, exist_ok=True)
    options.html.write_text(page(report))
    CONSOLE.print(f"{options.html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
