"""The results as tables on a terminal. Touches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from benchmarks.results import BARE, OURS, PEER, SERVERS, Figure, Outcome, Report, Sample, cached, summary
from rich.console import Group, RenderableType
from rich.table import Table

from vhostuser.bench.compare import Interval

AGAINST = {PEER: "the peer", BARE: "the bare loop"}


def interval_text(found: Interval | None) -> str:
    """A ratio and where it lies: ``1.23 (1.20-1.27)``."""
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})" if found else ""


def rate_text(value: float | None, spread: float | None) -> str:
    """Thousands of requests per second, and how far apart the rounds were."""
    return "" if value is None else f"{value / 1000:,.1f}" + (f" ±{50 * spread:.0f}%" if spread is not None else "")


def number_text(value: float | None) -> str:
    """Three digits that matter."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


LATENCIES: tuple[tuple[str, Callable[[Sample], float | None]], ...] = (
    ("p50", lambda sample: sample.p50_us),
    ("p99", lambda sample: sample.p99_us),
    ("p99.9", lambda sample: sample.p999_us),
)


def rate_of(sample: Sample) -> float | None:
    """Requests per second."""
    return sample.per_s


def cpu_of(sample: Sample) -> float | None:
    """Processor time of the back-end per request, in microseconds."""
    return sample.cpu_us


def latency_text(outcome: Outcome, server: str) -> str:
    """The three percentiles, by slashes."""
    return " / ".join(filter(None, (number_text(outcome.middle(server, value)) for _, value in LATENCIES)))


def report_tables(report: Report) -> RenderableType:
    """Everything that a person wants to see first."""
    parts: list[RenderableType] = [_outcomes(report.outcomes)] if report.outcomes else []
    if any(outcome.middle(OURS, LATENCIES[0][1]) for outcome in report.outcomes):
        parts.append(_latencies(report.outcomes))
    if report.figures:
        parts.append(_figures(report.figures))
    parts += summary_lines(report.outcomes)
    parts += [f"not measured: {text}" for text in report.skipped]
    return Group(*parts)


def summary_lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """For each of those that we are compared with: a sentence about files in the page cache, one about all tests."""
    for server, name in AGAINST.items():
        for kind, some in (("of files in the page cache", cached(outcomes)), ("in all", outcomes)):
            if found := summary(some, server):
                yield (
                    f"requests per second, ours to {name}: geometric mean {found.mean:.2f} of "
                    f"{found.count} tests {kind}, smallest {found.least:.2f} ({found.least_name})"
                )


def _outcomes(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="thousand requests per second; processor time of the back-end per request", box=None)
    table.add_column("")
    for name in (*SERVERS, "ours/peer", "ours/bare", "µs ours", "µs peer", "µs bare"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        rates = [rate_text(outcome.middle(name, rate_of), outcome.spread(name)) for name in SERVERS]
        ratios = [interval_text(outcome.ratio(name)) for name in AGAINST]
        times = [number_text(outcome.middle(name, cpu_of)) for name in SERVERS]
        table.add_row(outcome.title, *rates, *ratios, *times)
    return table


def _latencies(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="latency in µs: p50 / p99 / p99.9, medians of the rounds", box=None)
    table.add_column("")
    for name in SERVERS:
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        texts = [latency_text(outcome, name) for name in SERVERS]
        if any(texts):
            table.add_row(outcome.title, *texts)
    return table


def _figures(figures: Sequence[Figure]) -> Table:
    table = Table(title="besides; less is better", box=None)
    table.add_column("")
    for name in SERVERS:
        table.add_column(name, justify="right", no_wrap=True)
    for figure in figures:
        cells = [number_text(median(found)) if (found := figure.values.get(name)) else "" for name in SERVERS]
        table.add_row(f"{figure.title}, {figure.unit}", *cells)
    return table
