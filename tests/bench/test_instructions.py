"""What callgrind wrote, and when a count is a rise."""

from __future__ import annotations

import pytest
from benchmarks.instructions import RECORD, ROWS, Count, halves, read_record, verdict, write_record

PROFILE = """\
events: Ir
fn=(1) vhostuser_count::warm_up
7 10
cfn=(2) vhostuser_count::Bench::step
calls=512 100
+3 0
fn=(4) vhostuser_count::counted
cfi=(9) library/core/src/result.rs
cfn=(5) vhostuser_count::Bench::submit
calls=10 20
* 3000
cfn=(2)
calls=10 100
+1 8000
5 12
cfn=(6) <vhostuser_count::Bench>::reap
calls=10 30
-4 1500
cfn=(7) core::ops::drop
calls=10 1
5 999

fn=(2)
90 2000
cfn=(8) vhostuser_core::worker::run::pass
calls=10 3
91 6000
"""


def test_the_halves_are_what_the_counted_loop_calls() -> None:
    assert halves(PROFILE, 10) == Count(worker=800.0, driver=450.0)


def test_a_profile_without_one_of_the_calls_is_refused() -> None:
    with pytest.raises(SystemExit, match="no call of reap"):
        halves(PROFILE.replace("reap", "renamed"), 10)


def test_a_record_is_read_as_it_was_written() -> None:
    record = {"rustc 2.0": {"null read 1": Count(1000.5, 400.0)}, "rustc 1.9": {"null read 1": Count(1100.0, 410.0)}}
    assert read_record(write_record(record)) == record


def test_the_record_in_the_tree_has_every_row_and_is_as_it_is_written() -> None:
    text = RECORD.read_text()
    record = read_record(text)
    assert record
    assert all(section.keys() == set(ROWS) for section in record.values())
    assert write_record(record) == text


@pytest.mark.parametrize(
    ("now", "wrong"),
    [
        (Count(1050.0, 420.0), []),
        (Count(900.0, 100.0), []),
        (Count(1051.0, 400.0), ["null read 1: the worker's half executes 5.1% more than recorded; 5% is the limit"]),
        (Count(10.0, 500.0), ["null read 1: the driver's half executes 25.0% more than recorded; 5% is the limit"]),
    ],
)
def test_a_half_that_rose_by_more_than_the_limit_is_named(now: Count, wrong: list[str]) -> None:
    assert verdict({"null read 1": now}, {"null read 1": Count(1000.0, 400.0)}) == wrong


def test_a_row_that_was_not_recorded_is_named() -> None:
    assert verdict({"null read 1": Count(1.0, 1.0)}, {}) == ["null read 1: not recorded for this compiler"]
