"""`vhostuser stats`: what a served disk has done. Touches: its control socket, the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import click
import msgspec

from vhostuser.cli import asking, failures
from vhostuser.errors import OperatorError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = ("reads", "writes", "flushes", "read_bytes", "written_bytes", "errors", "in_flight", "oldest_age_us")
"""What people want to see first; the other keys are shown when they are not zero."""

LEVELS = frozenset({"in_flight", "held", "retrying", "oldest_age_us", "broken"})
"""Keys that say how things are now; all others count."""

Queues = list[dict[str, int]]
Requests = list[dict[str, int | str | None]]


@click.command("stats", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("socket")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object (with --watch: one per line). Counters are totals."
)
@click.option("--watch", is_flag=True, help="Go on until interrupted. People see counters per second then.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds, with --watch."
)
@click.option("--inflight", is_flag=True, help="The requests that are not answered yet, one by one.")
@asking.control_option
@failures.verbose_option
def command(
    socket: str, as_json: bool, watch: bool, interval: float, inflight: bool, control: str | None
) -> None:  # fmt: skip
    """Show what the disk served on SOCKET has done since it was started, queue by queue.

    Reading the counters stops nothing.
    """
    if inflight and watch:
        raise UsageError("--inflight", "it excludes --watch", "Use one of the two")
    with asking.connect(socket, control) as client:
        info = asking.ask(client, "disk.info")
        name, image = str(info["disk"]), str(info.get("image", "held"))
        if inflight:
            list_requests(name, checked_requests(asking.ask(client, "disk.requests")), as_json=as_json)
            return

        def read() -> Queues:
            return checked(asking.ask(client, "disk.stats"))

        if as_json:
            for queues in readings(read, interval) if watch else [read()]:
                image = str(asking.ask(client, "disk.info").get("image", image))
                print(json.dumps({"disk": name, "image": image, "queues": queues}), flush=True)
            return
        if image != "held":
            name = f"{name} (its image is {image})"
        if watch:
            live(name, readings(read, interval), interval)
        else:
            print_once(name, read())


def checked(answer: Mapping[str, object]) -> Queues:
    """The queues of an answer of ``disk.stats``. Raises `OperatorError` for one that is none."""
    try:
        return msgspec.convert(answer["queues"], Queues)
    except (KeyError, msgspec.ValidationError) as error:
        raise OperatorError(
            "disk.stats", "the answer makes no sense", "See whether both programs have one version"
        ) from error


def checked_requests(answer: Mapping[str, object]) -> Requests:
    """The requests of an answer of ``disk.requests``. Raises `OperatorError` for one that is none."""
    try:
        return msgspec.convert(answer["requests"], Requests)
    except (KeyError, msgspec.ValidationError) as error:
        raise OperatorError(
            "disk.requests", "the answer makes no sense", "See whether both programs have one version"
        ) from error


def list_requests(name: str, requests: Requests, *, as_json: bool) -> None:
    """Every request in flight, for programs or for a person."""
    if as_json:
        print(json.dumps({"disk": name, "requests": requests}))
        return
    from rich.table import Table

    from vhostuser.cli import screen

    made = Table("request", "type", "sector", "bytes", "age", "state", "error", title=f"{name}, in flight")
    for column in made.columns[2:5]:
        column.justify = "right"
    for one in requests:
        age_s = int(one["age_us"] or 0) / 1e6
        made.add_row(
            f"{one['queue']}:{one['head']}", str(one["type"]), str(one["sector"]), str(one["bytes"]), f"{age_s:.3f} s",
            str(one["state"]), str(one["error"] or ""),
        )  # fmt: skip
    screen.console().print(made)


def readings(read: Callable[[], Queues], interval_s: float) -> Iterator[Queues]:
    """One reading now and one after every interval, for ever."""
    while True:
        yield read()
        time.sleep(interval_s)


def per_second(before: Queues, after: Queues, interval_s: float) -> Queues:
    """What the counters gained per second; levels as they are now."""
    return [
        {key: value if key in LEVELS else round((value - old.get(key, 0)) / interval_s) for key, value in new.items()}
        for old, new in zip(before, after, strict=True)
    ]


def table(name: str, queues: Queues, unit: str) -> Table:
    """Keys down, queues across, their sum (for the age: the most) at the end."""
    from rich.table import Table

    made = Table("", *(f"queue {index}" for index in range(len(queues))), "all", title=f"{name}, {unit}")
    for column in made.columns[1:]:
        column.justify = "right"
    keys = list(dict.fromkeys([*SHOWN, *(key for queue in queues for key in queue)]))
    for key in keys:
        values = [queue.get(key, 0) for queue in queues]
        if key in SHOWN or any(values):
            whole = max(values, default=0) if key == "oldest_age_us" else sum(values)
            made.add_row(key, *(f"{value:,}" for value in (*values, whole)))
    return made


def print_once(name: str, queues: Queues) -> None:
    """The totals, for a person."""
    from rich.console import Console

    Console().print(table(name, queues, "totals"))


def live(name: str, all_readings: Iterator[Queues], interval_s: float) -> None:
    """A table that renews itself until it is interrupted."""
    from rich.live import Live

    before = next(all_readings)
    with Live(table(name, before, "totals"), auto_refresh=False) as screen:
        at = time.monotonic()
        for after in all_readings:
            passed = time.monotonic() - at
            at += passed
            screen.update(
                table(name, per_second(before, after, max(passed, interval_s / 2)), "per second"), refresh=True
            )
            before = after
