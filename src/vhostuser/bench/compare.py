"""Which of two is faster, and how sure that is. Touches nothing.

Runs alternate, A B A B, so that what the machine does besides falls on both. Each pair gives one ratio. The interval is
that of the sign test: from one ordered ratio to another, whatever the distribution, exact for independent pairs. Five
pairs or fewer cannot give 95 %: the coverage that they do give is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Final, TypeVar

__all__ = ["CONFIDENCE", "Interval", "alternate", "median", "median_interval"]

CONFIDENCE: Final = 0.95

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Interval:
    """The median of some values, and where the median of all that there could be lies."""

    median: float
    low: float
    high: float
    coverage: float
    """How probable it is that the interval holds it, at least."""


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The narrowest interval between ordered ``values`` that covers ``confidence``, or the widest there is."""
    ordered = sorted(values)
    count = len(ordered)
    cut = 0  # how many values are left out on either side
    while cut + 1 <= (count - 1) // 2 and covered(count, cut + 1) >= confidence:
        cut += 1
    return Interval(median(ordered), ordered[cut], ordered[count - 1 - cut], covered(count, cut))


def covered(count: int, cut: int) -> float:
    """How probably the median lies between ordered values, ``cut`` of ``count`` left out on either side."""
    beyond: float = sum(comb(count, few) for few in range(cut + 1)) / 2.0**count
    return max(0.0, 1.0 - 2.0 * beyond)


def alternate(first: Callable[[], T], second: Callable[[], T], pairs: int) -> Iterator[tuple[T, T]]:
    """Run the two in turn, ``pairs`` times."""
    for _ in range(pairs):
        yield first(), second()
