"""Random schedules over a `Pair`: what happens next is drawn, and how likely each step is changes from time to time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Final

from tests.oracle.host import Host
from tests.oracle.pair import Pair

counted: Final[Counter[str]] = Counter()
"""What all schedules of this run have done."""

MOOD: Final = 300
"""Steps between two changes of mind."""


def run(size: int, features: int, driver: str, device: str, *, operations: int, base: int, seed: int) -> None:
    """Makes ``operations`` steps and then drains the ring. The same arguments make the same steps."""
    rng = random.Random(f"{size} {features} {driver} {device} {base} {seed}")
    pair = Pair(Host(size, features), driver, device, base, rng)
    steps: list[tuple[Callable[[], None], int]] = [
        (pair.add, 20),
        (pair.publish_driver, 14),
        (pair.reap, 8),
        (pair.enable_calls, 8),
        (pair.disable_calls, 2),
        (pair.take, 20),
        (pair.push, 20),
        (pair.publish_device, 14),
        (pair.suppress_kicks, 2),
        (pair.enable_kicks, 8),
        (pair.restart, 1),
    ]
    try:
        while pair.operations < operations:
            weights = [weight * rng.choice((0, 1, 1, 1, 5)) for _, weight in steps]
            if not any(weights):
                continue
            burst = rng.choice((1, 1, 4, 64))
            until = min(pair.operations + MOOD, operations)
            while pair.operations < until:
                step, _ = rng.choices(steps, weights)[0]
                before = pair.operations
                for _ in range(rng.randint(1, burst) if step in (pair.add, pair.take, pair.push) else 1):
                    step()
                if pair.operations == before:
                    break  # an add without a free cell
        pair.drain()
    finally:
        counted.update(
            operations=pair.operations,
            chains=pair.chains,
            wraps=(pair.reaped >> 16),
            calls=pair.calls,
            kicks=pair.kicks,
        )
