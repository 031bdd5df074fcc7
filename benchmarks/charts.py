"""Ratios as bars on a logarithmic axis, as SVG that goes into a page. Touches nothing.

Colours are the classes ``peer`` and ``bare`` of the page, so that one drawing reads on light and on dark paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from math import ceil, floor, log2

from vhostuser.bench.compare import Interval

Row = tuple[str, Mapping[str, Interval]]
"""What is compared, and the ratio by the class of its bar."""

LABELS, PLOT, NUMBERS = 470, 460, 70
BAR, GAP, TOP, BOTTOM = 11, 9, 24, 24


def extent(rows: Sequence[Row]) -> tuple[int, int]:
    """The powers of two between which the axis goes; at least from a half to two."""
    lows = [found.low for _, bars in rows for found in bars.values()]
    highs = [found.high for _, bars in rows for found in bars.values()]
    return min([-1, *(floor(log2(low)) for low in lows)]), max([1, *(ceil(log2(high)) for high in highs)])


def ratio_chart(title: str, rows: Sequence[Row]) -> str:
    """One line for each row, with a bar for each ratio from 1 to its median and a whisker for its interval."""
    low, high = extent(rows)

    def place(value: float) -> float:
        return LABELS + PLOT * (log2(value) - low) / (high - low)

    heights = [len(bars) * BAR + GAP for _, bars in rows]
    height, width = TOP + sum(heights) + BOTTOM, LABELS + PLOT + NUMBERS
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for power in range(low, high + 1):
        x, text = place(2.0**power), f"{2**power}" if power >= 0 else f"1/{2**-power}"
        kind = "one" if power == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{text}</text>')
    y = float(TOP)
    for (label, bars), taken in zip(rows, heights, strict=True):
        middle = y + (taken - GAP) / 2 + 4
        parts.append(f'<text x="{LABELS - 12}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
        for number, (kind, found) in enumerate(bars.items()):
            parts += _bar(kind, found, place, y + number * BAR, label)
        y += taken
    return "\n".join([*parts, "</svg>"])


def _bar(kind: str, found: Interval, place: Callable[[float], float], y: float, label: str) -> Iterator[str]:
    begin, end = sorted((place(1.0), place(found.median)))
    middle = y + BAR / 2
    text = f"{label}, {kind}: {found.median:.3f} ({found.low:.3f} to {found.high:.3f}, {found.coverage:.0%})"
    yield f'<g class="{kind}"><title>{escape(text)}</title>'
    yield f'<rect x="{begin:.1f}" y="{y + 1:.1f}" width="{max(end - begin, 1):.1f}" height="{BAR - 2}" rx="2"/>'
    yield (
        f'<line class="whisker" x1="{place(found.low):.1f}" x2="{place(found.high):.1f}" '
        f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
    )
    yield f'<text class="number" x="{LABELS + PLOT + 12}" y="{middle + 4:.1f}">{found.median:.2f}</text></g>'
