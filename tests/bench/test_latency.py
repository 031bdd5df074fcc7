"""Percentiles from buckets, and intervals from pairs."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser.bench import PERCENTILES, Latencies, alternate, median_interval
from vhostuser.bench.load import process_cpu_s

BUCKETS = st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 50)), min_size=1, max_size=20)


@given(BUCKETS, st.sampled_from(sorted(PERCENTILES.values())))
def test_a_percentile_is_that_of_the_written_out_list(buckets: list[tuple[int, int]], share: Fraction) -> None:
    written_out = sorted(value for value, count in buckets for _ in range(count))
    rank = -(-len(written_out) * share.numerator // share.denominator)
    assert Latencies.of([buckets]).percentile_ns(share) == written_out[rank - 1]


def test_buckets_of_several_queues_are_put_together() -> None:
    both = Latencies.of([[(10, 1), (30, 2)], [(10, 4), (20, 1)]])
    assert both.buckets == ((10, 5), (20, 1), (30, 2))
    assert (both.count, both.longest_ns) == (8, 30)


def test_no_requests_have_no_latency() -> None:
    assert set(Latencies().told().values()) == {0.0}


@pytest.mark.parametrize(
    ("count", "left_out"),
    [(2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (10, 1), (12, 2), (20, 5), (30, 9)],
)
def test_the_interval_is_the_narrowest_that_covers_95_percent(count: int, left_out: int) -> None:
    found = median_interval([float(value) for value in range(count)])
    assert (found.low, found.high) == (left_out, count - 1 - left_out)
    assert found.coverage == pytest.approx(1 - 2 * sum(comb(count, few) for few in range(left_out + 1)) / 2**count)
    assert found.coverage >= 0.95 or count < 6


def test_runs_alternate() -> None:
    order: list[str] = []
    pairs = list(alternate(lambda: order.append("a"), lambda: order.append("b"), 3))
    assert "".join(order) == "ababab"
    assert len(pairs) == 3


def test_the_processor_time_of_a_process_grows_and_is_not_known_of_none() -> None:
    import os

    first = process_cpu_s(os.getpid())
    assert sum(range(100_000)) > 0
    second = process_cpu_s(os.getpid())
    assert first is not None
    assert second is not None
    assert second > first
    assert process_cpu_s(None) is None
    assert process_cpu_s((1 << 22) + 1) is None  # more than a kernel gives out
