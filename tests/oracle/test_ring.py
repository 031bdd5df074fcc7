"""The native ring against the one in Python, under random schedules.

`make oracle` makes more than a million steps; an ordinary run makes fewer of the same kind.
"""

from __future__ import annotations

import itertools
import random
from typing import Final

import pytest
from tests.oracle import schedule
from tests.oracle.host import Host
from tests.oracle.layout import F_EVENT_IDX, F_INDIRECT_DESC, F_NOTIFY_ON_EMPTY
from tests.oracle.pair import Pair

PAIRS: Final = (("native", "python"), ("python", "native"), ("native", "native"))
SIZES: Final = (1, 2, 256, 32768)
FEATURES: Final = (0, F_EVENT_IDX, F_INDIRECT_DESC | F_EVENT_IDX, F_INDIRECT_DESC | F_NOTIFY_ON_EMPTY)
CASES: Final = list(itertools.product(PAIRS, SIZES, FEATURES))


def named(value: object) -> str:
    """The identifiers of the cases."""
    return "-".join(value) if isinstance(value, tuple) else str(value) if isinstance(value, int) else ""


@pytest.mark.covers("VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_EVENT_IDX")
@pytest.mark.parametrize(("halves", "size", "features"), CASES, ids=named)
def test_every_step_of_a_random_schedule_is_what_the_specification_says(
    halves: tuple[str, str], size: int, features: int, oracle_operations: int
) -> None:
    driver, device = halves
    share = oracle_operations // len(CASES)
    bases = (65536 - min(size, 100), 0, 65535)
    for base in bases:
        schedule.run(size, features, driver, device, operations=share // len(bases) + 1, base=base, seed=1)


@pytest.mark.parametrize("halves", PAIRS, ids=named)
@pytest.mark.parametrize(
    ("size", "features"),
    [(1, 0), (1, F_EVENT_IDX), (2, F_EVENT_IDX), (256, 0), (256, F_EVENT_IDX), (32768, F_EVENT_IDX)],
)
def test_a_full_ring_goes_over_at_once_and_comes_back_at_once(
    halves: tuple[str, str], size: int, features: int
) -> None:
    pair = Pair(Host(size, features), *halves, 65536 - size // 2 - 1, random.Random(size))
    for _ in range(1 if size == 32768 else 5):
        while pair.free:
            pair.add(pair.long(1))
        pair.drain()
    schedule.counted.update(operations=pair.operations, chains=pair.chains)


@pytest.mark.parametrize("halves", PAIRS, ids=named)
@pytest.mark.parametrize("size", SIZES)
def test_a_chain_may_be_as_long_as_the_ring(halves: tuple[str, str], size: int) -> None:
    pair = Pair(Host(size, 0), *halves, 65535, random.Random(size))
    for _ in range(1 if size == 32768 else 5):
        pair.add(pair.long(size))
        assert pair.free == 0
        pair.drain()
    schedule.counted.update(operations=pair.operations, chains=pair.chains)
