"""A histogram of how long reads from the disk behind a vhost-user socket take, one at a time, as a person sees it.

python examples/latencies.py /tmp/disk.sock 10000
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter

from vhostuser import connect

WIDTH = 60


def measure(socket: str, count: int) -> Counter[int]:
    """How many of ``count`` random reads of 4 KiB took less than each power of two of microseconds."""
    times: Counter[int] = Counter()
    with connect(socket) as disk, disk.allocate(4096) as buffer:
        for _ in range(count):
            offset = random.randrange(disk.size // 4096) * 4096
            started = time.perf_counter_ns()
            disk.readinto(offset, buffer)
            times[(time.perf_counter_ns() - started) // 1000] += 1
    powers: Counter[int] = Counter()
    for microseconds, number in times.items():
        powers[1 << microseconds.bit_length()] += number
    return powers


def main(socket: str, count: int) -> None:
    """Draw it."""
    powers = measure(socket, count)
    most = max(powers.values())
    for below in sorted(powers):
        print(f"< {below:>8} µs {powers[below]:>8} {'#' * (WIDTH * powers[below] // most)}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
