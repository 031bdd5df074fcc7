"""What `vhostuser read`, `write` and `copy` share: opening both ends, the bar, the report.

Touches: what is copied, the terminal.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from vhostuser.cli.reaching import reaching
from vhostuser.errors import OperatorError, UsageError

if TYPE_CHECKING:
    from vhostuser.copying import DiskSide, Outcome, Sink, Source
    from vhostuser.copying.verify import Range

STANDARD = "-"
BACKEND = "vhost:"
SHOWN = 4
"""So many failed ranges are named; --json names all."""


def size(text: str) -> int:
    """A number of bytes, like 4096 or 4K."""
    from vhostuser.disks import parse_size

    return parse_size(text)


quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress bar, no report.")
json_option = click.option("--json", "as_json", is_flag=True, help="Report as one JSON object.")


@dataclass(frozen=True, slots=True)
class Manner:
    """How to copy."""

    timeout_s: float
    verify: bool = False
    quiet: bool = False
    as_json: bool = False


def is_backend(text: str) -> bool:
    """Whether ``text`` names a back-end: by its prefix, or because a socket is there."""
    if text.startswith(BACKEND):
        return True
    try:
        return text != STANDARD and stat.S_ISSOCK(os.stat(text).st_mode)
    except OSError:
        return False


def move(open_source: Callable[[], Source], open_sink: Callable[[], Sink], manner: Manner) -> None:
    """Copies, and reports. Raises `OperatorError` when not everything was copied, or verifying found a difference."""
    from vhostuser.copying import Copy, FileSide, Fingerprints, verify

    with ExitStack() as stack:
        source = open_source()
        stack.callback(source.close)
        sink = open_sink()
        stack.callback(sink.close)
        if isinstance(source, FileSide) and isinstance(sink, FileSide) and source.same_as(sink):
            raise UsageError(sink.name, "it is both what is copied and where to", "Name another")
        if manner.verify and not sink.readable:
            raise UsageError(sink.name, "it cannot be read back", "Name a file or a back-end, or leave out --verify")
        fingerprints = Fingerprints() if manner.verify else None
        started = time.monotonic()
        with bar("copying", source.size, manner) as advanced:
            outcome = Copy(source, sink, fingerprints=fingerprints, advanced=advanced).run()
        elapsed_s = time.monotonic() - started
        different: list[Range] = []
        if fingerprints is not None and not outcome.gave_up:
            failed = [(one.offset, one.length) for one in outcome.failures]
            with bar("verifying", outcome.size, manner) as advanced, reading_back(sink):
                different = verify(sink, outcome.size, fingerprints, failed, advanced)
        report(outcome, different, elapsed_s, manner, to_stdout=sink.name != STANDARD_OUTPUT)
        judge(outcome, different, source, sink)


@contextmanager
def reading_back(sink: Sink) -> Iterator[None]:
    """Turns a failure to read back into one that says so."""
    try:
        with reaching(sink.name):
            yield
    except OperatorError:
        raise
    except OSError as error:
        cause = f"it could not be read back: {error.strerror or error}"
        raise OperatorError(sink.name, cause, "See the log of the program behind it") from error


def report(outcome: Outcome, different: list[Range], elapsed_s: float, manner: Manner, *, to_stdout: bool) -> None:
    """Says what was done, on stdout unless that is what was copied to."""
    if manner.as_json:
        facts = {
            "bytes": outcome.size,
            "data_bytes": outcome.data,
            "seconds": round(elapsed_s, 6),
            "failures": [asdict(one) for one in outcome.failures],
            "gave_up": outcome.gave_up,
            "verified": manner.verify and not outcome.gave_up,
            "different": [{"offset": offset, "length": length} for offset, length in different],
        }
        print(json.dumps(facts), file=sys.stdout if to_stdout else sys.stderr)
    elif to_stdout and not manner.quiet and not outcome.failures and not different:
        zeroes = f", {outcome.size - outcome.data} of them zeroes" if outcome.size > outcome.data else ""
        verified = ", read back and found the same" if manner.verify else ""
        print(f"{outcome.size} bytes{zeroes}, in {elapsed_s:.1f} s{verified}")


def judge(outcome: Outcome, different: list[Range], source: Source, sink: Sink) -> None:
    """Raises what went wrong, in one line."""
    if outcome.failures:
        parts = [f"{one.length} bytes at {one.offset} could not be {one.verb}" for one in outcome.failures[:SHOWN]]
        more = len(outcome.failures) - SHOWN
        if more > 0:
            parts.append(f"and {more} more ranges")
        first = outcome.failures[0]
        advice = "It gave up there" if outcome.gave_up else "Everything else was copied"
        raise OperatorError(first.side, f"{first.cause}: {', '.join(parts)}", advice)
    if different:
        parts = [f"{length} bytes at {offset}" for offset, length in different[:SHOWN]]
        more = len(different) - SHOWN
        if more > 0:
            parts.append(f"and {more} more ranges")
        cause = f"it does not hold what was copied from {source.name}: {', '.join(parts)}"
        raise OperatorError(sink.name, cause, "See whether another program writes to it, or suspect its storage")


@contextmanager
def bar(what: str, total: int | None, manner: Manner) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and time left, on a terminal only; yields what is to be told how many bytes are done."""
    if manner.quiet or manner.as_json or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda length: progress.advance(task, length)


STANDARD_INPUT, STANDARD_OUTPUT = "standard input", "standard output"


def open_disk_side(text: str, timeout_s: float, *, start: int = 0, length: int | None = None) -> DiskSide:
    """The disk behind the back-end that ``text`` names."""
    from vhostuser import connect
    from vhostuser.copying import CHUNK, DiskSide

    path = text.removeprefix(BACKEND)
    with reaching(path):
        # Nothing is asked of the arena but copies, of as many chunks as are under way in both directions.
        client = connect(path, timeout_s=timeout_s, memory=4096, copy_memory=32 * CHUNK)
    try:
        return DiskSide(path, client, start=start, length=length)
    except BaseException:
        client.close()
        raise


def open_source(text: str, timeout_s: float) -> Source:
    """What ``text`` names: a back-end, a file, or standard input."""
    from vhostuser.copying import FileSide

    if text == STANDARD:
        return standard_input()
    return open_disk_side(text, timeout_s) if is_backend(text) else FileSide.source(text)


def open_sink(text: str, timeout_s: float) -> Sink:
    """What ``text`` names: a back-end, a file, or standard output."""
    from vhostuser.copying import FileSide

    if text == STANDARD:
        return standard_output()
    return open_disk_side(text, timeout_s) if is_backend(text) else FileSide.sink(text)


def standard_input() -> Source:
    """Standard input: its holes are found when it is a file."""
    from vhostuser.copying import FileSide, StreamSource
    from vhostuser.fds import Fd

    if stat.S_ISREG(os.fstat(0).st_mode):
        return FileSide(STANDARD_INPUT, Fd(os.dup(0)), start=os.lseek(0, 0, os.SEEK_CUR))
    return StreamSource(STANDARD_INPUT, 0)


def standard_output() -> Sink:
    """Standard output: holes are left in it when it is a file, unless everything is appended to that."""
    import fcntl

    from vhostuser.copying import FileSide, StreamSink
    from vhostuser.fds import Fd

    appends = fcntl.fcntl(1, fcntl.F_GETFL) & os.O_APPEND
    if stat.S_ISREG(os.fstat(1).st_mode) and not appends:
        return FileSide(STANDARD_OUTPUT, Fd(os.dup(1)), start=os.lseek(1, 0, os.SEEK_CUR))
    if os.isatty(1):
        raise UsageError(STANDARD_OUTPUT, "it is a terminal", "Send it to a file or a program: > FILE")
    return StreamSink(STANDARD_OUTPUT, 1)
