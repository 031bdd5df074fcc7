"""What a driver or a device may do wrong: the native half says the same of it as the one in Python."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.oracle.host import GUEST, Host
from tests.oracle.layout import F_EVENT_IDX, F_INDIRECT_DESC, INDIRECT, NEXT, WRITE, Descriptor
from tests.oracle.memory import Words
from tests.oracle.pair import Pair
from tests.oracle.ring import Device, RingBroken
from tests.oracle.schedule import counted

from vhostuser.errors import RemoteRingError

CALM: Final = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no finding
)

SIZE: Final = 8
HOST: Final = Host(SIZE, F_INDIRECT_DESC | F_EVENT_IDX)
"""One for all examples: each of them writes all that it reads."""

LIMIT: Final = sum(region.size for region in HOST.space.regions)
CUT: Final = HOST.space.regions[0].size

ADDRESSES = st.one_of(
    st.integers(GUEST, GUEST + LIMIT - 1),
    st.sampled_from((GUEST, GUEST + CUT - 3, GUEST + LIMIT - 1, GUEST - 1, GUEST + LIMIT, 0, 2**64 - 8)),
)
LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from((0, 16, 32, 64, 2**31, 2**32 - 1, 65536, 65552)))
FLAGS = st.one_of(
    st.sampled_from((0, NEXT, WRITE, WRITE | NEXT, NEXT, INDIRECT, INDIRECT | WRITE)), st.integers(0, 65535)
)


def descriptors(places: int) -> st.SearchStrategy[Descriptor]:
    """Anything that may be in a table of so many places."""
    following = st.one_of(st.integers(0, places), st.sampled_from((places - 1, places, 65535)))
    return st.builds(Descriptor, ADDRESSES, LENGTHS, FLAGS, following)


TABLE: Final = 6
RING_TABLES = st.lists(descriptors(SIZE), min_size=SIZE, max_size=SIZE)
INDIRECT_TABLES = st.lists(descriptors(TABLE), min_size=TABLE, max_size=TABLE)
HEADS = st.lists(st.one_of(st.integers(0, SIZE - 1), st.integers(0, 65535)), min_size=SIZE, max_size=SIZE)
IN_TABLE: Final = Descriptor(HOST.table(0) + 3, 16 * TABLE, INDIRECT, 0)
FINE: Final = Descriptor(GUEST, 4, 0, 0)
WRITABLE: Final = Descriptor(GUEST, 4, WRITE, 0)


def compare(
    features: int,
    table: list[Descriptor],
    indirect: list[Descriptor],
    indirect_at: list[int],
    heads: list[int],
    base: int,
    ahead: int,
) -> None:
    """Puts all that into the ring and lets both devices take what they can."""
    HOST.layout = layout = replace(HOST.layout, features=features)
    words = Words(HOST.buffer)
    for offset, length in layout.areas():
        HOST.buffer[offset : offset + length] = bytes(length)
    for number in indirect_at:
        table[number] = IN_TABLE
    HOST.buffer[layout.desc : layout.desc + 16 * SIZE] = b"".join(entry.pack() for entry in table)
    HOST.space.write(IN_TABLE.addr, b"".join(entry.pack() for entry in indirect))
    for number, head in enumerate(heads):
        words.set(layout.avail_entry(number), 2, head)
    words.set(layout.avail_idx, 2, (base + ahead) % 65536)
    native, model = HOST.device("native", base), HOST.device("python", base)
    assert isinstance(model, Device)
    for number in range(SIZE + 3):
        counted.update(operations=1)
        before = bytes(HOST.buffer)
        try:
            expected = model.take()
        except RingBroken as broken:
            with pytest.raises(RemoteRingError, match=str(broken)):
                native.take()
            break
        got = native.take()
        if expected is None or got is None:
            assert got == expected
            break
        head, faults = expected[0], model.taken[expected[0]].faults
        assert got[:3] == expected[:3]
        assert got[3] in faults if faults else got[3] is None
        if not faults:
            assert native.read(head) == model.read(head)
        assert bytes(HOST.buffer) == before, "to take a chain changes nothing"
        if number % 2 == 0:  # what was wrong with it is forgotten then
            model.push(head, number)
            native.push(head, number)
    assert native.in_flight == len(model.taken)


def test_whatever_a_driver_may_draw_both_devices_see_the_same(oracle_operations: int) -> None:
    rng = random.Random(1)

    def descriptor(places: int) -> Descriptor:
        addr = rng.choice((GUEST + rng.randrange(LIMIT), GUEST + CUT - 3, GUEST + LIMIT - 1, GUEST - 1, 0, 2**64 - 8))
        length = rng.choice((rng.randint(0, 40), 0, 16, 2**31, 2**32 - 1, 1))
        flags = rng.choice((0, NEXT, NEXT, NEXT, WRITE, WRITE | NEXT, WRITE | NEXT, INDIRECT, rng.randrange(65536)))
        return Descriptor(addr, length, flags, rng.choice((rng.randrange(places + 1), rng.randrange(places))))

    for _ in range(oracle_operations // 200):
        compare(
            rng.choice((0, F_EVENT_IDX, F_INDIRECT_DESC, F_INDIRECT_DESC, F_INDIRECT_DESC | F_EVENT_IDX)),
            [descriptor(SIZE) for _ in range(SIZE)],
            [descriptor(TABLE) for _ in range(TABLE)],
            [rng.randrange(SIZE) for _ in range(rng.randint(0, 3))],
            rng.sample(range(SIZE), SIZE) if rng.random() < 0.8 else [rng.randrange(SIZE + 1) for _ in range(SIZE)],
            rng.choice((0, 7, 65533)),
            rng.choice((SIZE, rng.randint(0, SIZE + 1))),
        )


@CALM
@given(
    features=st.sampled_from((0, F_EVENT_IDX, F_INDIRECT_DESC, F_INDIRECT_DESC | F_EVENT_IDX)),
    table=RING_TABLES,
    indirect=INDIRECT_TABLES,
    indirect_at=st.lists(st.integers(0, SIZE - 1), max_size=3),
    heads=HEADS,
    base=st.sampled_from((0, 7, 65533)),
    ahead=st.integers(0, SIZE + 2),
)
@example(F_INDIRECT_DESC, [FINE] * SIZE, [FINE] * TABLE, [], [0] * SIZE, 0, 2)
@example(
    F_INDIRECT_DESC, [replace(WRITABLE, flags=WRITE | NEXT, next=1), FINE] * 4, [FINE] * TABLE, [], [0] * SIZE, 0, 1
)
@example(F_INDIRECT_DESC, [FINE] * SIZE, [replace(FINE, flags=NEXT, next=TABLE)] * TABLE, [0], [0] * SIZE, 0, 1)
@example(F_INDIRECT_DESC, [FINE] * SIZE, [replace(FINE, flags=INDIRECT, length=16)] * TABLE, [0], [0] * SIZE, 0, 1)
@example(0, [FINE] * SIZE, [FINE] * TABLE, [0], [0] * SIZE, 0, 1)
@example(0, [FINE] * SIZE, [FINE] * TABLE, [], [SIZE] * SIZE, 0, 1)
@example(0, [replace(FINE, flags=NEXT, next=SIZE)] * SIZE, [FINE] * TABLE, [], [0] * SIZE, 0, 1)
def test_whatever_lies_in_the_ring_both_devices_see_the_same(
    features: int,
    table: list[Descriptor],
    indirect: list[Descriptor],
    indirect_at: list[int],
    heads: list[int],
    base: int,
    ahead: int,
) -> None:
    compare(features, table, indirect, indirect_at, heads, base, ahead)


@pytest.mark.parametrize(("entries", "fine"), [(4096, True), (4097, False)])
def test_an_indirect_table_may_be_longer_than_the_ring(entries: int, fine: bool) -> None:
    host = Host(512, F_INDIRECT_DESC)
    table = [Descriptor(GUEST, 1, NEXT, at + 1) for at in range(entries - 1)] + [Descriptor(GUEST, 1, WRITE, 0)]
    host.space.write(GUEST + 1, b"".join(entry.pack() for entry in table))
    ring = Descriptor(GUEST + 1, 16 * entries, INDIRECT, 0)
    host.buffer[host.layout.desc : host.layout.desc + 16] = ring.pack()
    for offset, length in host.layout.areas()[1:]:
        host.buffer[offset : offset + length] = bytes(length)
    Words(host.buffer).set(host.layout.avail_idx, 2, 1)
    device = host.device("native", 0)
    if fine:
        assert device.take() == (0, entries - 1, 1, None)
    else:
        with pytest.raises(RemoteRingError):
            device.take()


@pytest.mark.parametrize(("more", "fault"), [(0, None), (1, "length")])
def test_a_chain_may_describe_two_to_the_32_bytes_and_no_more(more: int, fault: str | None) -> None:
    host = Host(32768, F_INDIRECT_DESC)
    table = [Descriptor(GUEST + 2**20, 2**20, NEXT, at + 1) for at in range(4095)]
    table.append(Descriptor(GUEST + 2**20, 2**20 + more, WRITE, 0))
    host.space.write(GUEST + 1, b"".join(entry.pack() for entry in table))
    ring = Descriptor(GUEST + 1, 16 * len(table), INDIRECT, 0)
    host.buffer[host.layout.desc : host.layout.desc + 16] = ring.pack()
    for offset, length in host.layout.areas()[1:]:
        host.buffer[offset : offset + length] = bytes(length)
    Words(host.buffer).set(host.layout.avail_idx, 2, 1)
    assert host.device("native", 0).take() == (0, 4095 * 2**20, 2**20 + more, fault)


@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
def test_the_index_may_be_ahead_by_the_whole_ring_and_by_no_more(features: int) -> None:
    for base in (0, 65533):
        for ahead in (0, 1, SIZE, SIZE + 1, 32768, 65535):
            host = Host(SIZE, features)
            for offset, length in host.layout.areas():
                host.buffer[offset : offset + length] = bytes(length)
            Words(host.buffer).set(host.layout.avail_idx, 2, (base + ahead) % 65536)
            device = host.device("native", base)
            if ahead > SIZE:
                with pytest.raises(RemoteRingError):
                    device.take()
            else:
                assert (device.take() is not None) == (ahead > 0)


@CALM
@given(
    seed=st.integers(0, 2**32),
    chains=st.integers(0, 5),
    unpublished=st.integers(0, 2),
    idx=st.integers(0, SIZE),
    lies=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=SIZE, max_size=SIZE),
)
@example(seed=0, chains=1, unpublished=0, idx=2, lies=[(0, 0)] * SIZE)
@example(seed=0, chains=2, unpublished=0, idx=2, lies=[(0, 0), (0, 0)] + [(0, 0)] * (SIZE - 2))
@example(seed=0, chains=2, unpublished=0, idx=1, lies=[(9, 0)] * SIZE)
@example(seed=0, chains=2, unpublished=0, idx=1, lies=[(0, 30)] * SIZE)
@example(seed=0, chains=1, unpublished=1, idx=1, lies=[(1, 0)] * SIZE)
def test_a_driver_believes_a_device_nothing_that_cannot_be(
    seed: int, chains: int, unpublished: int, idx: int, lies: list[tuple[int, int]]
) -> None:
    host, rng = Host(SIZE, 0), random.Random(seed)
    pair = Pair(host, "native", "python", 65533, rng)
    for _ in range(chains):
        pair.add()
    pair.publish_driver()
    outstanding = {chain.head: chain.room for chain in pair.available}
    heads = list(outstanding)
    for _ in range(unpublished):
        pair.add()
    heads += [chain.head for chain in pair.added]
    words = Words(host.buffer)
    for number, (which, written) in enumerate(lies):
        head = heads[which] if which < len(heads) else rng.choice((SIZE - 1, SIZE, 65536, 2**32 - 1))
        words.set(host.layout.used_id(65533 + number), 4, head)
        words.set(host.layout.used_len(65533 + number), 4, written)
    words.set(host.layout.used_idx, 2, (65533 + idx) % 65536)
    jumped = idx > len(outstanding)
    honest = not jumped
    for number in range(idx):
        head = words.get(host.layout.used_id(65533 + number), 4)
        written = words.get(host.layout.used_len(65533 + number), 4)
        honest = honest and head in outstanding and written <= outstanding.pop(head)
    counted.update(operations=1)
    if honest:
        assert len(pair.driver.reap()) == idx
    else:
        with pytest.raises(RemoteRingError, match="jumped" if jumped else None):
            pair.driver.reap()
