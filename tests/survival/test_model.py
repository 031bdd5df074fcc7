"""The verifier itself: what it must see, it sees; what may be, it lets pass."""

from __future__ import annotations

import pytest
from tests.survival.model import BLOCK, Model, Violation, content


def reads(model: Model, at: int, data: bytes) -> None:
    model.check(model.read(at), data)


def test_before_it_is_acknowledged_a_write_may_be_there_or_not() -> None:
    model = Model(4)
    write = model.write(1)
    reads(model, 1, write.data)
    reads(model, 1, bytes(BLOCK))
    reads(model, 1, write.data[:8] + bytes(BLOCK - 8))
    model.written(write)
    with pytest.raises(Violation, match="block 1 holds zeroes"):
        reads(model, 1, bytes(BLOCK))


@pytest.mark.parametrize("data", [content(1, 1), content(0, 7), b"\1" * BLOCK, bytes(8)], ids=str)
def test_what_was_never_written_there_is_seen(data: bytes) -> None:
    model = Model(4)
    model.written(model.write(1))
    with pytest.raises(Violation):
        reads(model, 0, data)


def test_a_write_that_lands_after_a_later_one_was_acknowledged_is_seen() -> None:
    model = Model(1)
    old, new = model.write(0), None
    model.written(old)
    new = model.write(0)
    model.written(new)
    reads(model, 0, new.data)
    with pytest.raises(Violation, match=r"may hold \[2\]"):
        model.check_image(old.data)


def test_of_two_writes_at_once_either_stays_and_once_read_it_stays() -> None:
    model = Model(1)
    one, other = model.write(0), model.write(0)
    model.written(one)
    model.written(other)
    model.check_image(one.data)
    reads(model, 0, other.data)
    with pytest.raises(Violation):
        reads(model, 0, one.data)


def test_a_torn_block_is_seen_once_nothing_is_written_any_more() -> None:
    model = Model(1)
    during = model.read(0)
    write = model.write(0)
    torn = write.data[: BLOCK // 2] + bytes(BLOCK // 2)
    model.check(during, torn)
    after = model.write(0)
    model.failed(after)
    model.failed(write)
    with pytest.raises(Violation, match="torn"):
        reads(model, 0, torn)
