"""What is measured: one table of tests, and choosing among them. Touches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

GIB: Final = 1 << 30
SPAN: Final = 256 << 20
"""The part of every disk that is used, in bytes: small enough to be cached, whatever else the machine does."""

WORDS: Final = {
    "randread": "random read",
    "randwrite": "random write",
    "read": "sequential read",
    "write": "sequential write",
}
PLACES: Final = {
    "tmpfs": "file in memory",
    "ext4": "cached file",
    "direct": "file, O_DIRECT",
    "null": "null disk",
    "memory": "memory disk",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One test: a kind of disk and a load on it."""

    place: str
    """A key of `PLACES`."""
    pattern: str
    """A key of `WORDS`."""
    depth: int
    block_size: int = 4096
    queues: int = 1
    flush_every: int = 0
    sleeping: bool = False
    large: bool = False
    """The page cache holds large pieces of the file instead of such as the load itself would have brought there."""

    @property
    def name(self) -> str:
        """What it is called on the command line, like ``tmpfs/randread-4k-d32``."""
        words = [self.pattern, f"{self.block_size // 1024}k", f"d{self.depth}"]
        words += [f"flush{self.flush_every}"] * bool(self.flush_every)
        words += [f"q{self.queues}"] * (self.queues > 1) + ["sleeping"] * self.sleeping
        words += ["large"] * self.large
        return f"{self.place}/{'-'.join(words)}"

    @property
    def title(self) -> str:
        """The same for people."""
        words = f"{self.block_size // 1024} KiB {WORDS[self.pattern]}, {self.depth} at a time"
        words += f", flush after {self.flush_every}" * bool(self.flush_every)
        words += f", {self.queues} queues" * (self.queues > 1) + ", client sleeps" * self.sleeping
        words += ", cached in large pieces" * self.large
        return f"{PLACES[self.place]}: {words}"

    @property
    def writes(self) -> bool:
        """Whether it changes the disk."""
        return "write" in self.pattern

    @property
    def in_file(self) -> bool:
        """Whether the disk is an image; what is not has no peer."""
        return self.place in ("tmpfs", "ext4", "direct")


def _cached(place: str) -> list[Case]:
    small = [Case(place, pattern, depth) for pattern in ("randread", "randwrite") for depth in (1, 8, 32, 128)]
    asleep = [("randread", 1, 1), ("randread", 32, 1), ("randwrite", 1, 1), ("randread", 32, 2)]
    large = [Case(place, pattern, 8, block_size=131072) for pattern in ("read", "write")]
    return [
        *small,
        Case(place, "randwrite", 32, flush_every=32),
        # Two threads that look all the time would share the client's one processor by turns of the scheduler's length.
        *(Case(place, pattern, depth, queues=queues, sleeping=True) for pattern, depth, queues in asleep),
        *large,
    ]


CASES: Final[Sequence[Case]] = (
    *_cached("tmpfs"),
    *_cached("ext4"),
    *(Case("ext4", "randwrite", depth, large=True) for depth in (1, 32)),
    *(Case("direct", pattern, depth) for pattern in ("randread", "randwrite") for depth in (1, 32)),
    *(Case("null", "randread", depth) for depth in (1, 32, 128)),
    *(Case("memory", pattern, depth) for pattern in ("randread", "randwrite") for depth in (1, 32)),
)
"""Cached ones before those around the cache, which empty it."""

CACHED: Final = frozenset(case.name for case in CASES if case.place in ("tmpfs", "ext4"))
"""The names of those of files in the page cache, where a back-end decides how fast a disk is, and no device does."""

QEMU_IMG_DEPTHS: Final = (1, 8, 64)
OTHERS: Final = (*(f"qemu-img/read-4k-d{depth}" for depth in QEMU_IMG_DEPTHS), "guest/read-4k-d1", "footprint")
"""What is measured besides, by name."""


def chosen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a test is wanted: without patterns all are; a pattern is a part of the name, or a glob for all of it."""
    return not patterns or any(pattern in name or fnmatchcase(name, pattern) for pattern in patterns)


def select(patterns: Sequence[str]) -> list[Case]:
    """The chosen ones of the table, in its order."""
    return [case for case in CASES if chosen(case.name, patterns)]
