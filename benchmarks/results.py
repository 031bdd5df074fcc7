"""What came of the tests, and the numbers made of it: ratios of rounds, intervals, geometric means. Touches nothing.

Every round gives one ratio, ours to another's, because what the machine does besides falls on both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from statistics import median

from benchmarks.cases import CACHED, CASES, OTHERS

from vhostuser.bench.compare import Interval, median_interval

OURS, PEER, BARE = "ours", "peer", "bare"
SERVERS = (OURS, PEER, BARE)


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a load on one server."""

    per_s: float
    """Requests per second."""
    cpu_us: float | None = None
    """Processor time of the back-end per request, in microseconds, all its threads."""
    p50_us: float | None = None
    p99_us: float | None = None
    p999_us: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One test: the runs of every server, in the order of the rounds."""

    name: str
    title: str
    samples: Mapping[str, Sequence[Sample]]
    commands: Mapping[str, str]
    """How each server was started, and under "client" what the load was."""
    load_average: float = 0.0

    def middle(self, server: str, value: Callable[[Sample], float | None]) -> float | None:
        """The median over the rounds; None when there is nothing."""
        found = [number for sample in self.samples.get(server, ()) if (number := value(sample)) is not None]
        return median(found) if found else None

    def spread(self, server: str) -> float | None:
        """How far apart the greatest and the least requests per second are, as a share of the median."""
        rates = [sample.per_s for sample in self.samples.get(server, ())]
        return (max(rates) - min(rates)) / median(rates) if rates else None

    def ratio(self, to: str, value: Callable[[Sample], float | None] = lambda sample: sample.per_s) -> Interval | None:
        """Ours to another's: the median of the rounds' ratios and its interval; None without both."""
        pairs = zip(self.samples.get(OURS, ()), self.samples.get(to, ()), strict=False)
        ratios = [mine / its for ours, other in pairs if (mine := value(ours)) and (its := value(other))]
        return median_interval(ratios) if ratios else None


@dataclass(frozen=True, slots=True)
class Figure:
    """Something measured besides requests: start-up, memory, what idling costs. Less is better."""

    name: str
    title: str
    unit: str
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the benchmarks."""

    machine: Mapping[str, str]
    settings: Mapping[str, str]
    outcomes: Sequence[Outcome] = ()
    figures: Sequence[Figure] = ()
    skipped: Sequence[str] = field(default_factory=list)
    """What was not measured, each with its reason."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All ratios to one other server in one number, and the worst of them."""

    mean: float
    count: int
    least: float
    least_name: str


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product; of at least one positive number."""
    return exp(sum(map(log, values)) / len(values))


def summary(outcomes: Sequence[Outcome], to: str) -> Summary | None:
    """The geometric mean of the median ratios of all tests that both ran, and the smallest; None without any."""
    ratios = {outcome.title: found.median for outcome in outcomes if (found := outcome.ratio(to))}
    if not ratios:
        return None
    worst = min(ratios, key=ratios.__getitem__)
    return Summary(geometric_mean(list(ratios.values())), len(ratios), ratios[worst], worst)


def cached(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those of files in the page cache."""
    return [outcome for outcome in outcomes if outcome.name in CACHED]


def merged(reports: Sequence[Report]) -> Report:
    """Runs with different tests as one; of a test that several have, the last one's counts. Needs at least one.

    Tests are in the order of the table.
    """
    order = {name: number for number, name in enumerate([*(case.name for case in CASES), *OTHERS])}
    outcomes = {outcome.name: outcome for report in reports for outcome in report.outcomes}
    figures = {figure.name: figure for report in reports for figure in report.figures}
    skipped = dict.fromkeys(text for report in reports for text in report.skipped)
    first = reports[0]
    ordered = sorted(outcomes.values(), key=lambda outcome: order.get(outcome.name, len(order)))
    return Report(first.machine, first.settings, ordered, list(figures.values()), list(skipped))
