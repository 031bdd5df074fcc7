"""When a front-end tries again."""

from __future__ import annotations

import threading

import pytest

from vhostuser.errors import BackendUnfit, OperatorError, PeerGone
from vhostuser.frontend.reconnect import Backoff, try_again

QUICK = Backoff(first_s=0.0001, factor=2, most_s=0.001, give_up_s=10)


def test_waits_grow_up_to_a_bound() -> None:
    waits = Backoff(first_s=1, factor=2, most_s=5, give_up_s=100).waits()
    assert [next(waits) for _ in range(5)] == [1, 2, 4, 5, 5]


def test_no_wait_is_longer_than_what_is_left() -> None:
    assert next(Backoff(first_s=5, give_up_s=1).waits()) <= 1
    assert list(Backoff(give_up_s=0).waits()) == []


def test_it_is_tried_until_it_succeeds() -> None:
    failures = [PeerGone("no"), OperatorError("a", "b", "c"), PeerGone("still no")]

    def attempt() -> str:
        if failures:
            raise failures.pop()
        return "yes"

    assert try_again(attempt, QUICK.waits(), threading.Event()) == "yes"


def test_the_last_failure_is_told_when_it_is_given_up() -> None:
    def attempt() -> None:
        raise PeerGone("not today")

    with pytest.raises(PeerGone, match="not today"):
        try_again(attempt, Backoff(first_s=0.001, most_s=0.001, give_up_s=0.02).waits(), threading.Event())
    with pytest.raises(OperatorError, match="no time"):
        try_again(attempt, Backoff(give_up_s=0).waits(), threading.Event())


def test_an_unfit_back_end_is_not_tried_again() -> None:
    tries = []

    def attempt() -> None:
        tries.append(1)
        raise BackendUnfit("it", "lacks", "everything")

    with pytest.raises(BackendUnfit):
        try_again(attempt, QUICK.waits(), threading.Event())
    assert len(tries) == 1


def test_who_is_told_to_stop_stops() -> None:
    stop = threading.Event()
    stop.set()
    assert try_again(lambda: "never", Backoff(first_s=60).waits(), stop) is None
