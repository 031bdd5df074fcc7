"""What `vhostuser bench` prints. Touches: stdout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from vhostuser.cli import screen

if TYPE_CHECKING:
    from vhostuser.bench import Measured

Runs = Sequence[Sequence["Measured"]]

Metric = Callable[["Measured"], float | None]

METRICS: dict[str, tuple[Metric, str]] = {
    "iops": (lambda one: one.iops, "{:,.0f} requests/s"),
    "bytes_per_s": (lambda one: one.bytes_per_s, "{:,.0f} B/s"),
    "p50_us": (lambda one: one.all_latencies().told()["p50"], "{:,.1f} µs"),
    "p99_us": (lambda one: one.all_latencies().told()["p99"], "{:,.1f} µs"),
    "client_cpu_us": (lambda one: one.client_cpu_us, "{:,.3f} µs"),
    "backend_cpu_us": (lambda one: one.backend_cpu_us, "{:,.3f} µs"),
}
"""What is compared, by the name it has in JSON, and how a person reads it."""


def facts(one: Measured) -> dict[str, object]:
    """One run, for programs."""
    kinds = {"reads": one.reads, "writes": one.writes, "flushes": one.flushes}
    return {
        "seconds": one.elapsed_s,
        "requests": one.requests,
        "iops": one.iops,
        "bytes_per_s": one.bytes_per_s,
        "latency_us": {
            name: {"count": times.count, **times.told()} for name, times in kinds.items() if times.count
        },
        "client_cpu_us": one.client_cpu_us,
        "backend_cpu_us": one.backend_cpu_us,
        "errors": one.errors,
        "mismatches": one.mismatches,
        "first_mismatch": one.first_mismatch,
        "kicks": one.kicks,
        "sleeps": one.sleeps,
    }  # fmt: skip


def show(socket: str, one: Measured) -> None:
    """One run, for a person."""
    from rich.table import Table

    console = screen.console()
    console.print(
        f"{socket}: {one.iops:,.0f} requests/s, {one.bytes_per_s / 1e6:,.1f} MB/s, "
        f"{one.requests:,} in {one.elapsed_s:.2f} s, {one.errors} failed",
        soft_wrap=True,
    )
    latencies = Table("latency, µs", box=None, padding=(0, 2))
    kinds = {"reads": one.reads, "writes": one.writes, "flushes": one.flushes}
    told = {name: times.told() for name, times in kinds.items() if times.count}
    for name in next(iter(told.values()), {}):
        latencies.add_column(name, justify="right")
    for name, values in told.items():
        latencies.add_row(name, *(f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" for value in values.values()))
    console.print(latencies)
    console.print(
        f"processor time per request: {_told(one.client_cpu_us, '{:,.3f} µs')} here, "
        f"{_told(one.backend_cpu_us, '{:,.3f} µs')} in the back-end; {one.kicks:,} kicks, {one.sleeps:,} sleeps",
        soft_wrap=True,
    )


def comparison_facts(runs: Runs) -> dict[str, object]:
    """All pairs, for programs."""
    return {
        "pairs": len(runs),
        "interval": "order statistics of the ratios b/a (sign test), exact for independent pairs",
        "compared": {name: row for name, (metric, _) in METRICS.items() if (row := _compared(runs, metric))},
        "runs": [{"a": facts(a), "b": facts(b)} for a, b in runs],
    }


def _compared(runs: Runs, metric: Metric) -> dict[str, object] | None:
    from vhostuser.bench import median, median_interval

    pairs = [(a, b) for a, b in ((metric(first), metric(second)) for first, second in runs) if a and b]
    if len(pairs) < len(runs):
        return None
    ratio = median_interval([b / a for a, b in pairs])
    return {"a": median(a for a, _ in pairs), "b": median(b for _, b in pairs), "ratio": asdict(ratio)}


def show_comparison(a: str, b: str, runs: Runs) -> None:
    """All pairs, for a person: medians, and ratios of pairs with their interval."""
    from rich.table import Table

    from vhostuser.bench import median, median_interval

    console = screen.console()
    table = Table("", "A, median", "B, median", "B/A, median", "interval", box=None, padding=(0, 2))
    for column in table.columns[1:]:
        column.justify = "right"
    coverage = 0.0
    for name, (metric, form) in METRICS.items():
        pairs = [(first, second) for first, second in ((metric(x), metric(y)) for x, y in runs) if first and second]
        if len(pairs) < len(runs):
            continue
        ratio = median_interval([second / first for first, second in pairs])
        coverage = ratio.coverage
        table.add_row(
            name.removesuffix("_us").replace("_", " "),
            form.format(median(first for first, _ in pairs)),
            form.format(median(second for _, second in pairs)),
            f"{ratio.median:.3f}",
            f"{ratio.low:.3f} to {ratio.high:.3f}",
        )
    console.print(f"A: {a}\nB: {b}")
    console.print(table)
    console.print(
        f"{len(runs)} pairs, A B A B. The interval holds the median ratio with {coverage:.1%} probability, whatever "
        "the distribution, if pairs are independent (sign test). Processor time is per request.",
        soft_wrap=True,
    )


def _told(value: float | None, form: str) -> str:
    return "not known" if value is None else form.format(value)
