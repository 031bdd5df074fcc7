"""The arena of a front-end and the buffers in it."""

from __future__ import annotations

import random

import pytest

from vhostuser.errors import SetupError
from vhostuser.frontend import SharedMemory
from vhostuser.frontend.memory import MARK, PAGE, Pool


def test_a_pool_hands_out_pages_that_do_not_overlap_whatever_comes_back_when() -> None:
    draw = random.Random(3)
    pool = Pool(PAGE, 64 * PAGE)
    held: dict[int, int] = {}
    for _ in range(4000):
        if held and draw.random() < 0.5:
            offset = draw.choice(list(held))
            pool.give(offset, held.pop(offset))
            continue
        length = draw.randrange(1, 9 * PAGE)
        offset = pool.take(length)
        if offset is None:
            continue
        assert offset % PAGE == 0
        assert PAGE <= offset <= 65 * PAGE - length
        assert all(offset >= start + size or start >= offset + length for start, size in held.items())
        held[offset] = length
    for offset, length in held.items():
        pool.give(offset, length)
    assert pool.free == 64 * PAGE
    assert pool.take(64 * PAGE) == PAGE


def test_a_pool_that_is_full_says_so_and_has_room_again_later() -> None:
    pool = Pool(0, 2 * PAGE)
    first = pool.take(PAGE)
    assert first is not None
    assert pool.take(1) is not None
    assert pool.take(1) is None
    pool.give(first, PAGE)
    assert pool.take(PAGE) == first


def test_the_region_says_where_the_arena_lies_for_guest_and_user() -> None:
    memory = SharedMemory(100, 5000)
    region = memory.region
    assert region.size == memory.size == 4 * PAGE, "a page for the mark, one reserved, two for buffers"
    assert region.user_addr == memory.arena.address
    assert region.guest_addr not in (0, region.user_addr)
    assert bytes(memory.view[: len(MARK)]) == MARK


def test_reserved_room_is_not_given_to_buffers() -> None:
    memory = SharedMemory(3 * PAGE, 2 * PAGE)
    assert memory.reserve(1) == PAGE
    assert memory.reserve(2 * PAGE) == 2 * PAGE
    with pytest.raises(SetupError, match="1 bytes do not fit"):
        memory.reserve(1)
    assert memory.allocate(2 * PAGE).offset == 4 * PAGE


def test_a_buffer_is_memory_of_the_arena_and_its_parts_are_too() -> None:
    memory = SharedMemory(0, 4 * PAGE)
    with memory.allocate(PAGE) as buffer:
        buffer.view[:3] = b"abc"
        part = buffer[1:3]
        assert len(part) == 2
        assert bytes(part.view) == b"bc"
        assert bytes(part[1:].view) == b"c"
        assert part.guest_addr == memory.guest_addr + buffer.offset + 1
        with pytest.raises(ValueError, match="steps"):
            buffer[::2]
    assert memory.free == 4 * PAGE


def test_a_released_buffer_keeps_its_room_while_a_request_uses_it() -> None:
    memory = SharedMemory(0, PAGE)
    buffer = memory.allocate(PAGE)
    buffer.hold()
    buffer.release()
    buffer.release()
    with pytest.raises(SetupError, match="no 1 bytes in one piece"):
        memory.allocate(1)
    with pytest.raises(SetupError, match="released"):
        buffer.hold()
    buffer.drop()
    memory.allocate(PAGE).release()


def test_a_buffer_of_no_bytes_is_refused() -> None:
    with pytest.raises(SetupError, match="at least one byte"):
        SharedMemory(0, PAGE).allocate(0)
