"""The results as one page of HTML that needs nothing else. Touches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from statistics import median

from benchmarks.charts import Row, ratio_chart
from benchmarks.guests import WITHOUT_VM
from benchmarks.results import BARE, OURS, PEER, SERVERS, Figure, Outcome, Report, Sample
from benchmarks.tables import (
    AGAINST,
    cpu_of,
    interval_text,
    latency_text,
    number_text,
    rate_of,
    rate_text,
    summary_lines,
)

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1d1d1b; --dim: #6b6a66; --line: #dddbd5;
  --peer: #2a6fbb; --bare: #c4622d; }
@media (prefers-color-scheme: dark) { :root { --paper: #191918; --ink: #eceae4; --dim: #a09e97; --line: #3a3936;
  --peer: #6aa9ee; --bare: #e88f5c; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 80rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.note { color: var(--dim); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--dim); font-weight: 600; }
.facts td { text-align: left; white-space: normal; }
svg { display: block; width: 100%; min-width: 46rem; height: auto; fill: currentColor;
  font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .one { stroke: currentColor; } svg .tick { fill: var(--dim); }
svg .peer rect, svg .peer .number { fill: var(--peer); } svg .bare rect, svg .bare .number { fill: var(--bare); }
svg .whisker { stroke: currentColor; stroke-width: 1.5; }
.key span { margin-right: 1.5rem; }
.key i { border-radius: 2px; display: inline-block; height: .7em; margin-right: .4em;
  width: 1.4em; } .key .peer { background: var(--peer); } .key .bare { background: var(--bare); }
pre { background: color-mix(in srgb, var(--line) 35%, transparent); border-radius: 4px; font-size: 12px;
  margin: .3rem 0; overflow-x: auto; padding: .4rem .6rem; } summary { cursor: pointer; }
"""
KEY = (
    '<p class="key"><span><i class="peer"></i>ours to the peer</span>'
    '<span><i class="bare"></i>ours to the bare loop</span></p>'
)


def page(report: Report) -> str:
    """The whole page."""
    body = [
        "<h1>vhostuser: benchmarks</h1>",
        *(f"<p><strong>{escape(line[0].upper() + line[1:])}.</strong></p>" for line in summary_lines(report.outcomes)),
        f'<p class="note">Note: {escape(WITHOUT_VM)}.</p>',
        *_charts(report.outcomes),
        *_numbers(report.outcomes),
        *_figures(report.figures),
        *_skipped(report.skipped),
        "<h2>Machine and settings</h2>",
        _facts({**report.machine, **report.settings}),
        *_commands(report.outcomes),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    content = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head><title>vhostuser: benchmarks</title>{head}</head>\n'
        f"<body>\n{content}\n</body></html>\n"
    )


def chart_rows(outcomes: Sequence[Outcome], value: Callable[[Sample], float | None]) -> list[Row]:
    """The tests that have a ratio, with one bar for each of those that we are compared with."""
    rows: list[Row] = []
    for outcome in outcomes:
        bars = {name: found for name in (PEER, BARE) if (found := outcome.ratio(name, value))}
        if bars:
            rows.append((outcome.title, bars))
    return rows


def _charts(outcomes: Sequence[Outcome]) -> Iterator[str]:
    charts = (
        ("Requests per second", "Bars to the right: we are faster.", rate_of),
        ("Processor time of the back-end per request", "Bars to the left: we need less.", cpu_of),
    )
    for title, reading, value in charts:
        if rows := chart_rows(outcomes, value):
            yield f"<h2>{title}</h2><p>Ratios, median of the rounds and its interval. {reading}</p>{KEY}"
            yield f'<div class="wide">{ratio_chart(title, rows)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(text)}</th>" for text in head)
    rest = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead>\n<tbody>{rest}</tbody></table></div>'


def _numbers(outcomes: Sequence[Outcome]) -> Iterator[str]:
    if not outcomes:
        return
    yield "<h2>Numbers</h2><p>Thousand requests per second (median, ± half of the spread), and their ratios.</p>"
    yield _table(
        ["", *SERVERS, *(f"ours to {name}" for name in AGAINST.values()), "load average"],
        (
            [
                outcome.title,
                *(rate_text(outcome.middle(name, rate_of), outcome.spread(name)) for name in SERVERS),
                *(interval_text(outcome.ratio(name)) for name in AGAINST),
                f"{outcome.load_average:.2f}",
            ]
            for outcome in outcomes
        ),
    )
    yield (
        "<p>Processor time of the back-end per request in µs, then latency in µs: 50 / 99 / 99.9 of 100 were below.</p>"
    )
    yield _table(
        ["", *(f"time, {name}" for name in SERVERS), *(f"latency, {name}" for name in SERVERS)],
        (
            [
                outcome.title,
                *(number_text(outcome.middle(name, cpu_of)) for name in SERVERS),
                *(latency_text(outcome, name) for name in SERVERS),
            ]
            for outcome in outcomes
        ),
    )


def _figures(figures: Sequence[Figure]) -> Iterator[str]:
    if figures:
        yield "<h2>Besides requests</h2><p>Less is better.</p>"
        yield _table(
            ["", *SERVERS],
            (
                [f"{figure.title}, {figure.unit}"]
                + [number_text(median(found)) if (found := figure.values.get(name)) else "" for name in SERVERS]
                for figure in figures
            ),
        )


def _skipped(skipped: Sequence[str]) -> Iterator[str]:
    if skipped:
        yield "<h2>Not measured</h2>"
        yield f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in skipped)}</ul>"


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _commands(outcomes: Sequence[Outcome]) -> Iterator[str]:
    if outcomes:
        yield "<h2>Command lines</h2>"
    for outcome in outcomes:
        lines = "".join(
            f"<div>{name}</div><pre>{escape(outcome.commands[name])}</pre>"
            for name in (OURS, PEER, BARE, "client")
            if name in outcome.commands
        )
        title = f"{escape(outcome.title)} <code>{escape(outcome.name)}</code>"
        yield f"<details><summary>{title}</summary>{lines}</details>"
