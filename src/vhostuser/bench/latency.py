"""Latencies as the load counted them: how many fell into which bucket. Touches nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Self

PERCENTILES: Final[Mapping[str, Fraction]] = {
    "p50": Fraction(50, 100),
    "p90": Fraction(90, 100),
    "p99": Fraction(99, 100),
    "p99.9": Fraction(999, 1000),
    "p99.99": Fraction(9999, 10000),
}
"""What is told of every kind of request, by name; exact, so that a rank is not off by one."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """Times of one kind of request. A bucket is never wider than 1/64 of its value, and named by its greatest."""

    buckets: tuple[tuple[int, int], ...] = ()
    """Greatest value in nanoseconds and count, rising."""

    @classmethod
    def of(cls, parts: Iterable[Iterable[tuple[int, int]]]) -> Self:
        """Put the buckets of several loads together."""
        counts: Counter[int] = Counter()
        for part in parts:
            for value, count in part:
                counts[value] += count
        return cls(tuple(sorted(counts.items())))

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(count for _, count in self.buckets)

    def percentile_ns(self, share: Fraction) -> int:
        """The least value that ``share`` of all stayed at or below, in nanoseconds; 0 when there are none."""
        rank = -(-share * self.count // 1)  # rounded up
        seen = 0
        for value, count in self.buckets:
            seen += count
            if seen >= rank:
                return value
        return 0

    @property
    def longest_ns(self) -> int:
        """The longest, in nanoseconds; 0 when there are none."""
        return self.buckets[-1][0] if self.buckets else 0

    def told(self) -> dict[str, float]:
        """Every one of `PERCENTILES` and the longest, in microseconds."""
        told = {name: self.percentile_ns(share) / 1000 for name, share in PERCENTILES.items()}
        return {**told, "max": self.longest_ns / 1000}
