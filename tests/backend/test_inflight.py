"""In-flight tracking of one ring: what is in the region at every moment, and what a successor makes of it."""

from __future__ import annotations

import os
import random
from itertools import pairwise

import pytest
from tests.backend.inflight import Part, stride
from tests.oracle.host import Host

from vhostuser._native import DeviceRing, DriverRing, InflightRegion
from vhostuser.errors import GuestMemoryError, RemoteRingError, SetupError

SIZE = 8
INDIRECT_EVENT = 1 << 28 | 1 << 29


class Stage:
    """A ring, its region, a driver, and one device after another."""

    def __init__(self, base: int = 0, size: int = SIZE) -> None:
        self.size = size
        self.host = Host(size, INDIRECT_EVENT)
        self.driver: DriverRing = self.host.driver("native", base, random.Random(1))  # type: ignore[assignment]
        self.region = InflightRegion.create(2, size)
        self.part = Part(self.region, 1)
        self.base = base

    def device(self, base: int | None = None) -> DeviceRing:
        """A device that finds the ring and the region as they are; ``base`` is what SET_VRING_BASE says."""
        at = self.host.layout
        return DeviceRing(
            self.host.memory, size=at.size, desc=at.desc + 0x7F12_3456_7000, avail=at.avail + 0x7F12_3456_7000,
            used=at.used + 0x7F12_3456_7000, features=at.features, base=self.base if base is None else base,
            inflight=self.region, index=1,
        )  # fmt: skip

    def add(self, count: int) -> list[int]:
        heads = [self.driver.add([(self.host.cell(number), 16)], []) for number in range(count)]
        self.driver.publish()
        return heads


def take_all(device: DeviceRing) -> list[int]:
    heads = []
    while (taken := device.take()) is not None:
        heads.append(taken[0])
    return heads


@pytest.mark.parametrize("size", [1, 2, 4, 128, 32768])
def test_a_new_region_is_zero_and_as_large_as_peers_make_it(size: int) -> None:
    region = InflightRegion.create(3, size)
    assert region.size == 3 * stride(size) == os.fstat(region.fd).st_size
    assert os.pread(region.fd, region.size, 0) == bytes(region.size)
    assert (region.num_queues, region.queue_size, region.offset) == (3, size, 0)


def test_a_fresh_region_is_begun_with_what_the_ring_says_and_the_base_counts() -> None:
    stage = Stage(base=65533)
    stage.add(3)
    device = stage.device()
    assert stage.part.header == (0, 1, SIZE, 0, 65533)
    assert device.base == 65533
    assert len(take_all(device)) == 3


def test_chains_are_marked_in_the_order_they_are_taken_and_cleared_when_the_driver_sees_them() -> None:
    stage = Stage()
    heads = stage.add(4)
    device = stage.device()
    taken = take_all(device)
    assert taken == heads == stage.part.marked()
    assert [stage.part.entry(head)[2] for head in heads] == [0, 1, 2, 3]
    device.push(heads[2], 0)
    device.push(heads[0], 0)
    assert stage.part.marked() == heads, "not yet visible to the driver: a successor answers them again"
    assert stage.part.header[3] == heads[0]
    assert stage.part.entry(heads[0])[1] == heads[2]
    device.publish()
    assert stage.part.marked() == [heads[1], heads[3]]
    assert stage.part.used_idx == device.used_index == 2


def test_a_successor_takes_what_was_in_flight_first_and_then_the_new_ones_whatever_the_base() -> None:
    stage = Stage(base=65534)
    first = stage.add(4)
    device = stage.device()
    take_all(device)
    device.push(first[1], 0)
    device.publish()
    del device
    later = stage.add(2)
    successor = stage.device(base=12345)
    assert successor.base == (65534 + 4) % 65536
    assert take_all(successor) == [first[0], first[2], first[3], *later]
    for head in (first[0], first[2], first[3], *later):
        successor.push(head, 0)
    successor.publish()
    assert sorted(head for head, _ in stage.driver.reap()) == sorted([*first, *later])
    assert stage.part.marked() == []


def test_counters_go_on_after_the_highest_one() -> None:
    stage = Stage()
    take_all(stage_device := stage.device())
    heads = stage.add(2)
    take_all(stage_device)
    stage.part.set_entry(heads[1], inflight=1, counter=41)
    successor = stage.device()
    (new,) = stage.add(1)
    assert take_all(successor) == [*heads, new]
    assert stage.part.entry(new)[2] == 42


def test_a_batch_that_the_driver_saw_is_not_answered_again() -> None:
    """The predecessor died between storing used.idx and clearing its marks: every way of having got half-way."""
    for cleared in range(4):
        stage = Stage(base=65535)
        heads = stage.add(4)
        device = stage.device()
        take_all(device)
        for head in heads[:3]:
            device.push(head, 0)
        device.publish()
        del device
        for head in heads[cleared:3]:
            stage.part.set_entry(head, inflight=1, following=stage.part.entry(head)[1], counter=heads.index(head))
        stage.part.set_header(desc_num=SIZE, last_batch_head=heads[2], used_idx=65535)
        successor = stage.device()
        assert stage.part.used_idx == successor.used_index == 2
        assert take_all(successor) == [heads[3]]
        assert stage.part.marked() == [heads[3]]


def test_entries_that_the_driver_never_saw_are_taken_again() -> None:
    stage = Stage()
    heads = stage.add(2)
    device = stage.device()
    take_all(device)
    device.push(heads[1], 0)
    assert take_all(stage.device()) == heads


def test_after_a_clean_stop_a_region_says_where_to_go_on() -> None:
    stage = Stage()
    for _ in range(20):
        heads = stage.add(3)
        device = stage.device(base=0)
        assert take_all(device) == heads
        for head in reversed(heads):
            device.push(head, 0)
        device.publish()
        stage.driver.reap()
    assert stage.part.used_idx == 60


def stale(stage: Stage) -> str:
    before = bytes(stage.part.bytes)
    with pytest.raises(RemoteRingError, match="does not belong to this ring") as caught:
        stage.device()
    assert bytes(stage.part.bytes) == before, "a region that is not ours stays as it is"
    return str(caught.value)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"version": 2, "desc_num": SIZE, "used_idx": 0}, "its version is 2"),
        ({"desc_num": 2 * SIZE, "used_idx": 0}, "16 entries for a ring of 8"),
        ({"desc_num": SIZE, "used_idx": 65000}, "used.idx is 0 and it was left at 65000"),
        ({"desc_num": SIZE, "used_idx": 1}, "used.idx is 0 and it was left at 1"),
        ({"desc_num": SIZE, "used_idx": 65535, "last_batch_head": SIZE}, "goes on at 8"),
    ],
)
def test_a_region_of_another_ring_is_told_and_left_alone(header: dict[str, int], says: str) -> None:
    stage = Stage()
    stage.add(3)
    stage.part.set_header(**header)
    stage.part.set_entry(0, inflight=1)
    assert says in stale(stage)


def test_a_list_that_leaves_the_table_is_told() -> None:
    stage = Stage()
    stage.part.set_header(desc_num=SIZE, used_idx=65534, last_batch_head=3)
    stage.part.set_entry(3, inflight=0, following=0xFFFF)
    assert "goes on at 65535" in stale(stage)


def test_more_in_flight_than_the_driver_made_is_told() -> None:
    stage = Stage()
    stage.add(2)
    stage.part.set_header(desc_num=SIZE, used_idx=0)
    for head in (0, 3, 5):
        stage.part.set_entry(head, inflight=1)
    assert "3 requests in flight where 2 were made" in stale(stage)


def test_a_list_that_loops_ends() -> None:
    stage = Stage()
    heads = stage.add(SIZE)
    device = stage.device()
    take_all(device)
    for head in heads:
        device.push(head, 0)
    device.publish()
    stage.part.set_header(desc_num=SIZE, used_idx=0, last_batch_head=2)
    stage.part.set_entry(2, inflight=1, following=2)
    assert take_all(stage.device()) == []
    assert stage.part.marked() == []


@pytest.mark.parametrize("seed", range(20))
def test_a_random_life_with_many_deaths_answers_everything_once(seed: int) -> None:
    """Devices are dropped at any point between their steps; the driver must get each chain back exactly once."""
    rng = random.Random(seed)
    stage = Stage(base=65500)
    device = stage.device()
    flying: list[int] = []
    out: set[int] = set()
    answered = 0
    for _ in range(2000):
        match rng.randrange(8):
            case 0 | 1:
                if stage.driver.free:
                    head = stage.driver.add([(stage.host.cell(0), 16)], [])
                    stage.driver.publish()
                    assert head not in out
                    out.add(head)
            case 2 | 3:
                if (taken := device.take()) is not None:
                    flying.append(taken[0])
            case 4 | 5:
                if flying:
                    device.push(flying.pop(rng.randrange(len(flying))), 0)
            case 6:
                device.publish()
            case 7:
                if rng.random() < 0.3:
                    device, flying = stage.device(base=rng.randrange(65536)), []
        for head, _ in stage.driver.reap():
            out.remove(head)
            answered += 1
    flying += take_all(device)
    for head in flying:
        device.push(head, 0)
    device.publish()
    for head, _ in stage.driver.reap():
        out.remove(head)
    assert not out
    assert answered > 100


def test_a_part_begins_where_the_one_before_ends() -> None:
    region = InflightRegion.create(4, 128)
    starts = [Part(region, index).start for index in range(4)]
    assert all(after - before == stride(128) for before, after in pairwise(starts))


def test_a_region_is_refused_when_its_numbers_do_not_fit() -> None:
    good = InflightRegion.create(2, 128)

    def remap(**changes: int) -> InflightRegion:
        numbers = {"offset": 0, "size": good.size, "num_queues": 2, "queue_size": 128} | changes
        return InflightRegion(good.fd, **numbers)

    remap()
    with pytest.raises(SetupError, match="2 queues of 128 take"):
        remap(size=good.size - 1)
    with pytest.raises(SetupError, match="cannot have 0 queues"):
        remap(num_queues=0)
    with pytest.raises(SetupError, match="cannot have 2 queues of 32769"):
        remap(queue_size=32769)
    with pytest.raises(SetupError, match="multiple of 8"):
        remap(offset=4)
    with pytest.raises(GuestMemoryError, match="cannot be mapped"):
        remap(offset=64)
    with pytest.raises(GuestMemoryError, match="cannot be mapped"):
        remap(offset=2**64 - 8)
    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write), pytest.raises(GuestMemoryError, match="cannot be mapped"):
        InflightRegion(read, offset=0, size=good.size, num_queues=2, queue_size=128)
    stage = Stage()
    stage.region = InflightRegion.create(2, SIZE // 2)
    with pytest.raises(SetupError, match="rings of 4, not of 8"):
        stage.device()
    stage.region = InflightRegion.create(1, SIZE)
    with pytest.raises(SetupError, match="no part for queue 1"):
        stage.device()
