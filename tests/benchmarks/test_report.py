"""The drawing, the page and the tables, from made-up runs; what other programs say, as they said it."""

from __future__ import annotations

from io import StringIO
from xml.etree import ElementTree

import pytest
from benchmarks.charts import extent, ratio_chart
from benchmarks.clients import sample_of
from benchmarks.footprint import resident
from benchmarks.guests import seconds_of
from benchmarks.report import page
from benchmarks.results import BARE, OURS, PEER, Figure, Outcome, Report, Sample
from benchmarks.servers import Failed
from benchmarks.tables import interval_text, number_text, report_tables
from rich.console import Console

from vhostuser.bench.compare import Interval

ROWS = [("a <b>", {PEER: Interval(2.0, 1.5, 3.0, 0.95), BARE: Interval(0.5, 0.2, 0.6, 0.95)})]


def report() -> Report:
    samples = {OURS: [Sample(2000.0, 1.0, 10.0, 20.0, 30.0)], PEER: [Sample(1000.0, 3.0, 20.0, 40.0, 60.0)]}
    outcomes = [Outcome("a", "4 KiB & more", samples, {OURS: "serve '<x>'", "client": "bench"})]
    return Report(
        {"kernel": "Linux"}, {"rounds": "1"}, outcomes, [Figure("i", "idle", "ms", {OURS: [1.0]})], ["x: <y>"]
    )


def test_the_axis_goes_between_powers_of_two() -> None:
    assert extent(ROWS) == (-3, 2)
    assert extent([("a", {PEER: Interval(1.0, 0.9, 1.1, 0.95)})]) == (-1, 1)


def test_bars_begin_at_one_and_end_at_the_median() -> None:
    drawing = ElementTree.fromstring(ratio_chart("t", ROWS))
    (one,) = [float(line.attrib["x1"]) for line in drawing.iter("line") if line.attrib["class"] == "one"]
    longer, shorter = ((float(bar.attrib["x"]), float(bar.attrib["width"])) for bar in drawing.iter("rect"))
    assert longer[0] == pytest.approx(one)
    assert sum(shorter) == pytest.approx(one)
    assert longer[1] == pytest.approx(shorter[1])  # twice as fast and half as fast are equally long


def test_the_page_needs_nothing_else_and_escapes_what_it_shows() -> None:
    text = page(report())
    for wanted in ("4 KiB &amp; more", "serve &#x27;&lt;x&gt;&#x27;", "x: &lt;y&gt;", "<svg", "no virtual machine"):
        assert wanted in text
    assert "http" not in text


def test_the_tables_show_rates_ratios_and_what_is_missing() -> None:
    console = Console(width=220, file=StringIO())
    with console.capture() as capture:
        console.print(report_tables(report()))
    text = capture.get()
    for wanted in ("2.00 (2.00-2.00)", "10.0 / 20.0 / 30.0", "geometric mean 2.00 of 1 tests", "not measured: x: <y>"):
        assert wanted in text


def test_numbers_have_three_digits_that_matter() -> None:
    assert [number_text(value) for value in (None, 1234.5, 12.34, 1.234)] == ["", "1,234", "12.3", "1.23"]
    assert interval_text(None) == ""


def test_the_memory_of_the_guest_is_left_out() -> None:
    smaps = (
        "7f0000000000-7f0000001000 rw-s 00000000 00:01 7   /memfd:vhostuser (deleted)\nSize: 4 kB\nRss:   400 kB\n"
        "7f1000000000-7f1000001000 r-xp 00000000 00:01 8   /usr/lib/x.so\nRss:   8 kB\nPss: 4 kB\n"
        "7f2000000000-7f2000001000 rw-p 00000000 00:00 0 \nRss:   4 kB\n"
    )
    assert resident(smaps, "/images/disk.img") == (12 * 1024, 0)
    smaps += "7f3000000000-7f3000200000 rw-s 00000000 00:1b 7   /images/disk.img\nRss:   2048 kB\n"
    assert resident(smaps, "/images/disk.img") == (12 * 1024, 2 << 20)


def test_dd_says_how_long_it_took() -> None:
    said = "4000+0 records in\n4000+0 records out\n16384000 bytes (16 MB, 16 MiB) copied, 0.75 s, 21.8 MB/s\n"
    assert seconds_of(said) == 0.75
    with pytest.raises(Failed):
        seconds_of(said.replace("4000+0", "3999+0"))


def test_a_sample_is_of_the_requests_and_not_of_the_flushes() -> None:
    times = {"count": 9, "p50": 1.0, "p99": 2.0, "p99.9": 3.0}
    told = {"iops": 5.0, "backend_cpu_us": None, "latency_us": {"writes": times, "flushes": {"p50": 9.0}}}
    assert sample_of(told) == Sample(5.0, None, 1.0, 2.0, 3.0)
