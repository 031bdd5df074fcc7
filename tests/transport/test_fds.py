"""A descriptor has one owner and is closed exactly once."""

from __future__ import annotations

import gc
import os

import pytest

from vhostuser.fds import Fd


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def null() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def test_a_descriptor_is_closed_once() -> None:
    fd = Fd(null())
    number = fd.fileno()
    assert not fd.closed
    assert repr(fd) == f"Fd({number})"
    fd.close()
    assert fd.closed
    assert not is_open(number)
    other = null()  # takes the same number
    fd.close()
    assert is_open(other)
    os.close(other)
    assert repr(fd) == "Fd(closed)"


def test_a_closed_one_has_no_number() -> None:
    fd = Fd(null())
    fd.close()
    for use in (fd.fileno, fd.detach, fd.duplicate):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_the_end_of_a_block_closes_it() -> None:
    with Fd(null()) as fd:
        number = fd.fileno()
    assert not is_open(number)


def test_detaching_gives_the_descriptor_away() -> None:
    fd = Fd(null())
    number = fd.detach()
    assert fd.closed
    assert is_open(number)
    os.close(number)


def test_a_duplicate_is_independent_and_closed_on_exec() -> None:
    with Fd(null()) as fd:
        copy = fd.duplicate()
        assert not os.get_inheritable(copy.fileno())
    assert is_open(copy.fileno())
    copy.close()


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 is no descriptor"):
        Fd(-1)


def test_a_forgotten_one_closes_itself_silently_or_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    number = null()
    Fd(number)
    gc.collect()
    assert not is_open(number)
    monkeypatch.setattr(Fd, "warn_when_forgotten", True)
    forgotten = Fd(null())
    with pytest.warns(ResourceWarning, match="was forgotten"):
        forgotten.__del__()
    assert forgotten.closed


def test_a_descriptor_that_somebody_else_closed_is_no_error() -> None:
    fd = Fd(null())
    os.close(fd.fileno())
    fd.close()
    assert fd.closed
