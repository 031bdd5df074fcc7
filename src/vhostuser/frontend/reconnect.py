"""When to try again after a back-end has gone. Touches a clock.

A new connection is a new `HostDevice` with new memory and new rings: the process that has gone may still write into the
old ones. Requests that it had not answered have failed by then; none is sent twice.
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


def try_again(attempt: Callable[[], T], backoff: Backoff, stop: threading.Event) -> T | None:
    """Call ``attempt`` until it succeeds; None once ``stop`` is set. Blocks.

    Raises the last failure when ``backoff`` gives up, and `BackendUnfit` at once: waiting mends nothing there.
    """
    failure: VhostUserError | None = None
    for wait in backoff.waits():
        if stop.wait(wait):
            return None
        try:
            return attempt()
        except BackendUnfit:
            raise
        except VhostUserError as error:
            failure = error
    raise failure or OperatorError("the back-end", "there was no time to connect again", "Allow more time")
