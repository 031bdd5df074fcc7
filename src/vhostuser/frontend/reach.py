"""The ways to a back-end: connect to it, wait for it, or take over a connection. Touches the sockets it opens."""

from __future__ import annotations

import os
import select
from typing import TypeAlias

from vhostuser import transport
from vhostuser.errors import PeerGone, UsageError
from vhostuser.fds import Fd
from vhostuser.transport import Listener, Transport

Endpoint: TypeAlias = str | os.PathLike[str] | int | Fd | Transport
"""A path (``@name`` for an abstract socket), the number of an inherited socket, or a connection."""


def reach(endpoint: Endpoint, *, listen: bool, timeout_s: float) -> Transport:
    """Return the connection to the back-end; it takes over a descriptor or transport.

    An inherited socket that listens is waited on like one of our own. Raises `OperatorError` when nobody is there,
    `PeerGone` when nobody comes within ``timeout_s``.
    """
    if isinstance(endpoint, Transport):
        return endpoint
    if isinstance(endpoint, int | Fd):
        found = transport.adopt(endpoint, send_timeout_s=timeout_s)
        return found if isinstance(found, Transport) else _accept(found, name_of_endpoint(endpoint), timeout_s)
    path = os.fspath(endpoint)
    if listen:
        return _accept(transport.listen(path), path, timeout_s)
    return transport.connect(path, timeout_s, send_timeout_s=timeout_s)


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


def _accept(listener: Listener, name: str, timeout_s: float) -> Transport:
    """Accept one back-end, and stop listening."""
    with listener:
        poll = select.poll()
        poll.register(listener.fileno(), select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise PeerGone(f"no back-end connected to {name} within {timeout_s:g} s")
        return listener.accept(send_timeout_s=timeout_s)
