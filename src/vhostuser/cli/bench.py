"""`vhostuser bench`: how fast a back-end is, or which of two. Touches: one connection to each, the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from vhostuser.cli import failures, reaching
from vhostuser.cli.bench_report import comparison_facts, facts, show, show_comparison
from vhostuser.cli.moving import size
from vhostuser.errors import OperatorError, UsageError

if TYPE_CHECKING:
    from vhostuser.bench import Load, Measured, Target

PATTERNS = ("read", "write", "randread", "randwrite", "randrw")
WARM_UP_S = 0.2


@click.command("bench", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("socket")
@click.option("--pattern", type=click.Choice(PATTERNS), default="randread", show_default=True, help="Which requests.")
@click.option("--block-size", type=size, default="4K", show_default=True, help="Bytes of each request.")
@click.option(
    "--depth", type=click.IntRange(1, 8192), default=32, show_default=True, help="Requests under way, of each queue."
)
@click.option("--queues", type=click.IntRange(1, 256), default=1, show_default=True, help="Queues, a thread for each.")
@click.option(
    "--time",
    "seconds",
    type=click.FloatRange(0.01, 86400),
    default=2.0,
    show_default=True,
    help="Seconds, of each run.",
)
@click.option("--read-share", type=click.FloatRange(0, 1), show_default="0.5", help="With randrw: the share of reads.")
@click.option("--span", type=size, show_default="all", help="Use only so many bytes, from the start of the disk.")
@click.option("--flush-every", type=click.IntRange(0), default=0, metavar="N", help="A flush after every N writes.")
@click.option("--verify", is_flag=True, help="With randrw: compare what is read with what was written before.")
@click.option("--sleeping", is_flag=True, help="Wait for notifications, as a guest does, instead of polling.")
@click.option("--destroy-data", is_flag=True, help="Needed for patterns that write: what is on the disk is lost.")
@click.option("--compare", "other", metavar="SOCKET2", help="Alternate with this back-end, and tell ratios.")
@click.option("--pairs", type=click.IntRange(2, 1000), default=10, show_default=True, help="With --compare: how often.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@reaching.timeout_option
@failures.verbose_option
def command(
    socket: str,
    pattern: str,
    block_size: int,
    depth: int,
    queues: int,
    seconds: float,
    read_share: float | None,
    span: int | None,
    flush_every: int,
    verify: bool,
    sleeping: bool,
    destroy_data: bool,
    other: str | None,
    pairs: int,
    as_json: bool,
    timeout_s: float,
) -> None:
    """Measure the back-end on SOCKET: requests per second, latencies, processor time of both sides per request.

    Nothing runs in between: no virtual machine, no file system. Latencies are from putting a request into the ring to
    finding its answer. With --compare runs alternate, A B A B, and every pair gives a ratio.
    """
    from vhostuser.bench import PATTERNS, Load, Pattern

    chosen = PATTERNS[pattern]
    if read_share is not None:
        if pattern != "randrw":
            raise UsageError("--read-share", f"{pattern} has only one kind of requests", "Use --pattern randrw")
        chosen = Pattern(read_share, sequential=False)
    load = Load(chosen, block_size, depth, queues, span, flush_every, verify, sleeping)
    load.check()
    if load.writes and not destroy_data:
        raise UsageError(
            f"--pattern {pattern}", "it overwrites what is on the disk", "Add --destroy-data if nothing there is needed"
        )
    shape = {"pattern": pattern, "block_size": block_size, "depth": depth, "queues": queues, "sleeping": sleeping}
    sockets = [socket] if other is None else [socket, other]
    runs = measured(sockets, load, seconds, timeout_s, pairs if other is not None else 1)
    if other is None:
        one = runs[0][0]
        print(json.dumps({"socket": socket, **shape, **facts(one)}, indent=2)) if as_json else show(socket, one)
    elif as_json:
        print(json.dumps({"a": socket, "b": other, **shape, **comparison_facts(runs)}, indent=2))
    else:
        show_comparison(socket, other, runs)
    judge(sockets, runs)


def measured(
    sockets: Sequence[str], load: Load, seconds: float, timeout_s: float, rounds: int
) -> list[tuple[Measured, ...]]:
    """Runs the load ``rounds`` times on each, in turn, after a short run on each that does not count."""
    from vhostuser.bench import Target

    with ExitStack() as stack:
        targets: list[tuple[str, Target, int | None]] = []
        for socket in sockets:
            with reaching.reaching(socket):
                target = stack.enter_context(Target(socket, load, timeout_s=timeout_s))
            targets.append((socket, target, reaching.peer_pid(target.device.fileno())))

        def run(of: tuple[str, Target, int | None], for_s: float, seed: int) -> Measured:
            socket, target, pid = of
            with reaching.reaching(socket):
                return target.run(for_s, seed=seed, pid=pid)

        for each in targets:
            run(each, min(WARM_UP_S, seconds), 0)
        return [tuple(run(each, seconds, number) for each in targets) for number in range(1, rounds + 1)]


def judge(sockets: Sequence[str], runs: Sequence[Sequence[Measured]]) -> None:
    """Raises `OperatorError` when requests failed, or brought what was not written."""
    for index, socket in enumerate(sockets):
        for run in runs:
            one = run[index]
            if one.mismatches:
                cause = f"{one.mismatches} reads brought something else than what was written"
                where = f"{cause}, the first at {one.first_mismatch} bytes"
                raise OperatorError(socket, where, "Do not trust this back-end, or its storage, with data")
            if one.errors:
                raise OperatorError(
                    socket, f"{one.errors} requests failed, and count as answers", "See the log of the back-end"
                )
