"""The ways to a back-end: connect to it, wait for it, or take over a connection. Touches the sockets it opens."""

from __future__ import annotations

import os
import select
import threading
import time
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from vhostuser import transport
from vhostuser.errors import PeerGone, UsageError
from vhostuser.fds import Fd
from vhostuser.transport import Listener, Transport

Endpoint: TypeAlias = str | os.PathLike[str] | int | Fd | Transport
"""A path (``@name`` for an abstract socket), the number of an inherited socket, or a connection."""

STEP_S: Final = 0.1
"""How often a wait that can be stopped looks whether it is: connecting waits for nothing but the listener."""


def reach(endpoint: Endpoint, *, listen: bool, timeout_s: float, stop: threading.Event | None = None) -> Transport:
    """Return the connection to the back-end; it takes over a descriptor or transport.

    An inherited socket that listens is waited on like one of our own. Raises `OperatorError` when nobody is there,
    `PeerGone` when nobody comes within ``timeout_s``, or within `STEP_S` of ``stop`` being set.
    """
    wait = _Wait(name_of_endpoint(endpoint), timeout_s, stop)
    if isinstance(endpoint, Transport):
        return endpoint
    if isinstance(endpoint, int | Fd):
        found = transport.adopt(endpoint, send_timeout_s=timeout_s)
        return found if isinstance(found, Transport) else _accept(found, wait)
    path = os.fspath(endpoint)
    if listen:
        return _accept(transport.listen(path), wait)
    while True:
        try:
            return transport.connect(path, wait.step_s, send_timeout_s=timeout_s)
        except PeerGone:
            wait.check(f"{path} did not accept a connection")


def reachable_again(endpoint: Endpoint) -> str:
    """The path of ``endpoint``. Raises `UsageError` when it is none: a connection that was handed over comes once."""
    if isinstance(endpoint, str | os.PathLike):
        return os.fspath(endpoint)
    raise UsageError(name_of_endpoint(endpoint), "it cannot be connected to again", "Give a path, or do not reconnect")


def name_of_endpoint(endpoint: Endpoint) -> str:
    """What a person calls it."""
    if isinstance(endpoint, str | os.PathLike):
        return os.fspath(endpoint)
    if isinstance(endpoint, int):
        return f"file descriptor {endpoint}"
    return f"file descriptor {endpoint.fileno()}"


@dataclass(frozen=True, slots=True)
class _Wait:
    """How long to wait for a connection."""

    name: str
    timeout_s: float
    stop: threading.Event | None
    begun: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.begun + self.timeout_s - time.monotonic()

    @property
    def step_s(self) -> float:
        """How long to wait before `check`; more than 0, which a socket takes for ever."""
        return max(0.001, self.left_s if self.stop is None else min(self.left_s, STEP_S))

    def check(self, cause: str) -> None:
        """Raise `PeerGone` when the wait is over."""
        if self.stop is not None and self.stop.is_set():
            raise PeerGone(f"{self.name} was given up")
        if self.left_s <= 0:
            raise PeerGone(f"{cause} within {self.timeout_s:g} s")


def _accept(listener: Listener, wait: _Wait) -> Transport:
    """Accept one back-end, and stop listening."""
    with listener:
        poll = select.poll()
        poll.register(listener.fileno(), select.POLLIN)
        while not poll.poll(wait.step_s * 1000):
            wait.check(f"no back-end connected to {wait.name}")
        return listener.accept(send_timeout_s=wait.timeout_s)
