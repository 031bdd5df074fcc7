"""Log lines that a peer can cause at will: a burst of a kind is shown, and how many were not."""

from __future__ import annotations

import json
import logging

from vhostuser.cli.logs import BURST, PERIOD_S, Damper, JsonFormatter, TextFormatter


def line(text: str = "%s: a front-end was refused: %s", *values: object) -> logging.LogRecord:
    return logging.LogRecord("vhostuser.backend", logging.WARNING, "", 0, text, values or ("disk", "another"), None)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_of_a_kind_is_shown_whatever_its_values() -> None:
    damper = Damper(Clock())
    shown = [damper.filter(line("%s is refused: %d", "disk", number)) for number in range(1000)]
    assert shown == [True] * BURST + [False] * (1000 - BURST)
    assert damper.filter(line("something else")), "each kind counts by itself"


def test_after_a_while_the_next_one_is_shown_and_says_how_many_were_not() -> None:
    clock = Clock()
    damper = Damper(clock)
    for _ in range(BURST + 7):
        damper.filter(line())
    clock.now += PERIOD_S
    record = line()
    assert damper.filter(record)
    assert TextFormatter(verbose=False).format(record).endswith("(7 more lines like this one were left out)")
    assert json.loads(JsonFormatter(verbose=False).format(record))["left_out"] == 7
    assert damper.filter(record := line()), "and a new burst"
    assert "left out" not in TextFormatter(verbose=False).format(record)


def test_seldom_lines_are_all_shown() -> None:
    clock = Clock()
    damper = Damper(clock)
    for _ in range(100):
        assert damper.filter(record := line())
        assert not hasattr(record, "left_out")
        clock.now += PERIOD_S
