"""The two small protocols of systemd: notices about our state, and sockets it hands over. Touches the environment.

Spoken by hand, for they are a datagram and three variables. Nothing here fails when there is no systemd.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from vhostuser.errors import UsageError
from vhostuser.fds import Fd

FIRST_FD: Final = 3
"""Where handed over descriptors begin."""

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"

log = logging.getLogger(__name__)


class Manager:
    """The service manager, if there is one that wants to hear of us. Connected to once: a sandbox makes no socket."""

    def __init__(self) -> None:
        """Connect to where ``NOTIFY_SOCKET`` says. A manager that cannot be reached is logged and ignored."""
        self._socket: socket.socket | None = None
        address = os.environ.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return
        own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            own.connect("\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            log.warning("the service manager is told nothing: %s", error)
            own.close()
        else:
            self._socket = own

    def notify(self, state: str) -> bool:
        """Tell ``state``: `READY`, `STOPPING`, or several assignments on lines of their own.

        Returns False when nobody wants to know, or is logged and ignored.
        """
        if self._socket is None:
            return False
        try:
            self._socket.send(state.encode(), socket.MSG_NOSIGNAL)
        except OSError as error:
            log.warning("the service manager was not told %s: %s", state, error)
            return False
        return True

    def close(self) -> None:
        """Disconnect. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Passed:
    """A descriptor that the service manager handed over; who receives it owns it."""

    fd: Fd
    name: str
    """FileDescriptorName= of the socket unit; "unknown" when none was given."""


def passed_fds() -> list[Passed]:
    """Take over the descriptors that the service manager passed to this very process, once: none the second time.

    They are closed on exec from now on and the variables are gone, so that no child takes them for its own. Raises
    `UsageError` when what the variables say cannot be true.
    """
    names = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")
    values = {name: os.environ.pop(name, "") for name in names}
    if not values["LISTEN_FDS"] or not _meant_for_us(values["LISTEN_PID"], values["LISTEN_PIDFDID"]):
        return []
    count = values["LISTEN_FDS"]
    if not count.isdecimal() or int(count) > 1024:
        raise UsageError(
            "LISTEN_FDS", f"{count!r} is no number of descriptors", "Start this program by its socket unit"
        )
    labels = values["LISTEN_FDNAMES"].split(":") if values["LISTEN_FDNAMES"] else []
    labels += ["unknown"] * int(count)
    for number in range(FIRST_FD, FIRST_FD + int(count)):
        try:
            os.set_inheritable(number, False)
        except OSError as error:
            raise UsageError(
                f"file descriptor {number}", "LISTEN_FDS counts it, but it is not open", "Start by the socket unit"
            ) from error
    return [Passed(Fd(FIRST_FD + offset), labels[offset]) for offset in range(int(count))]


def _meant_for_us(pid: str, pidfd_id: str) -> bool:
    if pid != str(os.getpid()):
        return False
    if not pidfd_id.isdecimal():
        return True
    with Fd(os.pidfd_open(os.getpid())) as own:
        return os.fstat(own.fileno()).st_ino == int(pidfd_id)
