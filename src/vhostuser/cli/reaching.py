"""Reaching a back-end that somebody else may be using, and saying what is wrong when it cannot be reached.

Touches: the back-end's socket, and the kernel's list of sockets when it does not answer.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from vhostuser.errors import (
    BackendRefused,
    OperatorError,
    PeerGone,
    RemoteProtocolError,
    RemoteRingError,
    SetupError,
    UsageError,
)

LOOK_S = 0.2
"""How long a second look at a silent back-end takes."""

CONNECTED, CONNECTING = "03", "02"
"""States in /proc/net/unix: accepted by the program, and not yet."""

ADVICE_BROKEN = "Report it to the makers of the back-end"

timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.05),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the back-end may take for an answer on its socket.",
)
"""For every command that connects."""


@contextmanager
def reaching(path: str) -> Iterator[None]:
    """Turns what goes wrong with the back-end on ``path`` into an `OperatorError` that says whose fault it is."""
    try:
        yield
    except PeerGone as error:
        raise OperatorError(path, *explained(path, str(error))) from error
    except (RemoteProtocolError, RemoteRingError, BackendRefused) as error:
        raise OperatorError(path, str(error).rstrip("."), ADVICE_BROKEN) from error
    except SetupError as error:
        raise UsageError(path, str(error).rstrip("."), "Change the options") from error


def explained(path: str, cause: str) -> tuple[str, str]:
    """The cause and the advice, once it was looked who else is connected there."""
    cause = cause.rstrip(".")
    try:
        others, waiting = connections(path)
    except OSError:
        return cause, "Check that the program behind the socket is running"
    if others:
        return f"it is busy with another front-end ({cause})", "Stop the virtual machine or program that uses it"
    if waiting:
        return f"nobody accepts connections there ({cause})", "See whether the program behind the socket hangs"
    return cause, "See the log of the program behind the socket"


def connections(path: str) -> tuple[int, bool]:
    """How many others are connected to the socket, and whether a new connection is left waiting.

    Connects for a moment. Raises `OSError` when that is impossible.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as ours:
        ours.settimeout(LOOK_S)
        ours.connect("\0" + path[1:] if path.startswith("@") else path)
        bound = ours.getpeername()  # what the list calls it: the path at the time it was bound
        name = "@" + bound[1:].decode(errors="replace") if isinstance(bound, bytes) else str(bound)
        hung_up = bool(select.select([ours], [], [], LOOK_S)[0])
        states = [state for state, place in listed() if place == name]
    waiting = CONNECTING in states
    accepted = states.count(CONNECTED)
    return accepted - (0 if waiting or hung_up else 1), waiting


def listed() -> Iterator[tuple[str, str]]:
    """State and name of every socket of this machine that has a name."""
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8:
            yield fields[5], fields[7]


def peer_pid(fd: int) -> int | None:
    """The process that listens at the other end of a connected socket; None when it cannot be seen from here.

    Behind a socket that the service manager made that is the service manager, which is not the one that works.
    """
    with suppress(OSError), socket.socket(fileno=socket.dup(fd)) as ours:
        pid, _, _ = struct.unpack("3i", ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid) if pid > 1 else None
    return None
