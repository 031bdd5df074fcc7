"""Ratios, means and intervals of made-up runs."""

from __future__ import annotations

import msgspec
import pytest
from benchmarks.results import (
    BARE,
    OURS,
    PEER,
    Figure,
    Outcome,
    Report,
    Sample,
    cached,
    geometric_mean,
    merged,
    summary,
)


def outcome(name: str, ours: list[float], peer: list[float], **more: list[float]) -> Outcome:
    rates = {OURS: ours, PEER: peer, **more}
    samples = {server: [Sample(rate, 1e6 / rate) for rate in each] for server, each in rates.items() if each}
    return Outcome(name, name.upper(), samples, {})


def test_each_round_gives_one_ratio() -> None:
    found = outcome("a", [100.0, 50.0, 90.0], [50.0, 25.0, 30.0]).ratio(PEER)
    assert found is not None
    assert (found.median, found.low, found.high) == (2.0, 2.0, 3.0)


def test_a_server_that_did_not_run_has_no_ratio() -> None:
    assert outcome("a", [1.0], []).ratio(PEER) is None
    assert outcome("a", [1.0], []).middle(BARE, lambda sample: sample.per_s) is None


def test_the_ratio_of_processor_time_is_of_processor_time() -> None:
    found = outcome("a", [100.0], [50.0]).ratio(PEER, lambda sample: sample.cpu_us)
    assert found is not None
    assert found.median == pytest.approx(0.5)


def test_the_spread_is_a_share_of_the_median() -> None:
    assert outcome("a", [90.0, 100.0, 120.0], []).spread(OURS) == pytest.approx(0.3)
    assert outcome("a", [90.0], []).spread(PEER) is None


def test_the_geometric_mean_of_a_number_and_its_inverse_is_one() -> None:
    assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)


def test_the_summary_names_the_worst_test() -> None:
    found = summary([outcome("a", [8.0], [2.0]), outcome("b", [1.0], [4.0]), outcome("c", [1.0], [])], PEER)
    assert found is not None
    assert (found.count, found.least, found.least_name) == (2, 0.25, "B")
    assert found.mean == pytest.approx(1.0)
    assert summary([outcome("c", [1.0], [])], PEER) is None


def test_files_in_the_page_cache_have_a_mean_of_their_own() -> None:
    names = ["tmpfs/randread-4k-d1", "direct/randread-4k-d1", "ext4/randwrite-4k-d1-large", "guest/read-4k-d1"]
    found = cached([outcome(name, [1.0], [1.0]) for name in names])
    assert [one.name for one in found] == [names[0], names[2]]


def test_of_a_test_that_was_run_twice_the_last_counts() -> None:
    first = Report({"kernel": "a"}, {}, [outcome("a", [1.0], [1.0])], [Figure("idle", "", "", {})], ["x"])
    second = Report({"kernel": "b"}, {}, [outcome("a", [3.0], [1.0]), outcome("b", [1.0], [1.0])], [], ["x", "y"])
    report = merged([first, second])
    assert [found.name for found in report.outcomes] == ["a", "b"]
    assert report.outcomes[0].samples[OURS][0].per_s == 3.0
    assert report.skipped == ["x", "y"]


def test_a_report_survives_being_written_and_read() -> None:
    report = Report({"kernel": "a"}, {}, [outcome("a", [1.0], [1.0])], [Figure("idle", "t", "ms", {OURS: [1.5]})], [])
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
