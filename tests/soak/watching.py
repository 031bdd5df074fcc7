"""How processes change over time: private memory, descriptors, threads. Touches /proc."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import Final

PERIOD_S: Final = 5.0
WARM_UP: Final = 0.15
"""The share of samples left out at the start: caches and pools fill, connections of every kind come once."""
FLAT_KIB: Final = 4096
FLAT_FDS: Final = 6
FLAT_THREADS: Final = 4
"""How much more the end may have than the beginning. Calls over the control socket have a descriptor and a thread each,
a connection some more, and what is sampled is a moment."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment."""

    at_s: float
    life: int  # the process's number
    private_kib: int  # RssAnon: without files and without the memory of guests
    resident_kib: int
    fds: int
    threads: int


@dataclass(slots=True)
class Series:
    """The samples of a process, or of the processes that followed each other in one place."""

    name: str
    pid: Callable[[], int]
    lasting: bool
    """One process for all the time. The others are not judged by growth, only by their largest."""
    samples: list[Sample] = field(default_factory=list)

    def take(self, at_s: float) -> None:
        """Add a sample; none when the process is not there at the moment."""
        pid = self.pid()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            fds = len(os.listdir(f"/proc/{pid}/fd"))
        except (FileNotFoundError, ProcessLookupError):
            return
        values = dict(re.findall(r"^(RssAnon|VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
        if len(values) == 3:  # a process that has died has no memory
            self.samples.append(
                Sample(at_s, pid, int(values["RssAnon"]), int(values["VmRSS"]), fds, int(values["Threads"]))
            )

    def summary(self) -> dict[str, object]:
        """First, last, largest and slope of each number."""
        kept = self.samples[int(len(self.samples) * WARM_UP) :]
        return {
            "lasting": self.lasting,
            "samples": len(self.samples),
            "lives": len({sample.life for sample in self.samples}),
            "private_kib": _numbers(kept, lambda sample: sample.private_kib),
            "resident_kib": _numbers(kept, lambda sample: sample.resident_kib),
            "fds": _numbers(kept, lambda sample: sample.fds),
            "threads": _numbers(kept, lambda sample: sample.threads),
        }

    def growth(self) -> list[str]:
        """What is not flat, in words: the last third against the first."""
        kept = self.samples[int(len(self.samples) * WARM_UP) :]
        third = len(kept) // 3
        if not third:
            return [f"{self.name}: only {len(self.samples)} samples"]
        begin, end = kept[:third], kept[-third:]
        found = []
        if self.lasting:
            before, after = (median(sample.private_kib for sample in part) for part in (begin, end))
            if after - before > FLAT_KIB:
                found.append(f"{self.name}: private memory went from {before:.0f} to {after:.0f} KiB")
        for what, limit in (("fds", FLAT_FDS), ("threads", FLAT_THREADS)):
            before, after = (max(getattr(sample, what) for sample in part) for part in (begin, end))
            if after - before > limit:
                found.append(f"{self.name}: {what} went from {before} to {after}")
        return found


def _numbers(samples: Sequence[Sample], value: Callable[[Sample], int]) -> dict[str, float]:
    values = [value(sample) for sample in samples]
    if not values:
        return {}
    times = [sample.at_s / 3600 for sample in samples]
    slope = linear_regression(times, values).slope if len(set(times)) > 1 else 0.0
    tenth = max(1, len(values) // 10)
    return {
        "first": median(values[:tenth]),
        "last": median(values[-tenth:]),
        "max": max(values),
        "slope_per_hour": round(slope, 1),
    }


class Watch:
    """Takes samples of every series until it is told to stop."""

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.began = time.monotonic()

    def add(self, name: str, pid: Callable[[], int], *, lasting: bool) -> None:
        """Watch what ``pid`` names at each moment."""
        self.series.append(Series(name, pid, lasting))

    def run(self, stop: threading.Event) -> None:
        """Sample until ``stop``."""
        while not stop.wait(PERIOD_S):
            for series in self.series:
                series.take(time.monotonic() - self.began)
