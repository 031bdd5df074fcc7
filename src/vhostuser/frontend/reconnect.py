"""When to try again after a back-end has gone. Touches a clock.

A new connection is a new `HostDevice`. With a region of in-flight tracking it takes over memory and rings as they are;
else both are new, too, since the process that has gone may still write into the old ones, and the requests that it had
not answered have failed by then. No request is made twice by the host side, either way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from vhostuser.errors import BackendUnfit, OperatorError, VhostUserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often to try, and for how long: waits grow from ``first_s`` by ``factor`` up to ``most_s``."""

    first_s: float = 0.05
    factor: float = 2.0
    most_s: float = 2.0
    give_up_s: float = 60.0

    def waits(self) -> Iterator[float]:
        """The seconds to wait before each try, until ``give_up_s`` have passed since the first was asked for."""
        deadline = time.monotonic() + self.give_up_s
        wait = self.first_s
        while (left := deadline - time.monotonic()) > 0:
            yield min(wait, left)
            wait = min(wait * self.factor, self.most_s)


class Outages:
    """The outages of one front-end. One that is lost again before anything came of it is the same outage still.

    So a request that kills every back-end that takes it is given up with the others, in the time of the back-off.
    """

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._waits: Iterator[float] | None = None
        self._since = 0.0
        self._answered = 0

    def waits(self, answered: int) -> Iterator[float]:
        """The waits of an outage that begins now. ``answered``: how many requests were answered so far."""
        held = time.monotonic() - self._since > self._backoff.most_s
        if self._waits is None or answered != self._answered or held:
            self._waits = self._backoff.waits()
        return self._waits

    def over(self, answered: int) -> None:
        """A connection is made, after ``answered`` requests."""
        self._since = time.monotonic()
        self._answered = answered


def try_again(
    attempt: Callable[[], T], waits: Iterator[float], stop: threading.Event, reason: VhostUserError | None = None
) -> T | None:
    """Call ``attempt`` until it succeeds; None once ``stop`` is set. Blocks.

    Raises the last failure when ``waits`` end, or ``reason`` when there was no time at all, and `BackendUnfit` at once:
    waiting mends nothing there.
    """
    failure = reason
    for wait in waits:
        if stop.wait(wait):
            return None
        try:
            return attempt()
        except BackendUnfit:
            raise
        except VhostUserError as error:
            failure = error
        if stop.is_set():
            return None
    raise failure or OperatorError("the back-end", "there was no time to connect again", "Allow more time")
