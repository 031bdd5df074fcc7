"""What a serving process gives up for good: files first, then system calls. Touches this process and all its threads.

The order matters. Files (Landlock) are given up by one thread for itself and those it makes, so that is done while
there is no other; system calls (seccomp) are given up by all threads at once, when nothing is left to open or to make.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from typing import Final

from vhostuser._native import Confined, restrict_calls, restrict_files
from vhostuser.errors import OperatorError

MODES: Final = ("on", "require", "off")
PASSES: Final = 50
PASS_S: Final = 0.002
"""So often, and in between, it is looked whether threads that were joined have gone."""

log = logging.getLogger(__name__)


class Sandbox:
    """The restrictions of this process, in two steps. Nothing undoes them."""

    def __init__(self, mode: str = "on") -> None:
        """``mode``: "on" goes on where the kernel cannot enforce something, and says so; "require" raises
        `OperatorError` there; "off" restricts nothing."""
        self._mode = mode
        self._enforced: list[str] = []
        self._missing: list[str] = []

    def give_up_files(self, sockets: Iterable[str | None]) -> None:
        """Open, make, change and run no file from now on, connect to no TCP port, signal no other process.

        What is open stays usable, and files may be removed from the directories of ``sockets``, paths of sockets that
        are removed at the end. Call it before there is a second thread.
        """
        if self._mode == "off":
            return
        paths = [path for path in sockets if path is not None and not path.startswith("@")]
        directories = sorted({os.path.dirname(os.path.abspath(path)) for path in paths})
        others = _other_threads()
        try:
            confined = restrict_files(directories)
        except OSError as error:
            self._lack("files stay reachable, Landlock", error)
            return
        self._enforced += _described(confined, directories)
        if others:
            self._lack(f"{others} threads that were there before still reach files", None)

    def give_up_calls(self) -> None:
        """Make none but the system calls of serving from now on, on any thread: open and connect nothing, execute
        nothing, make no process and no io_uring. Those that the queues need exist by now. Logs what is enforced.
        """
        if self._mode == "off":
            log.info("sandbox: off")
            return
        try:
            restrict_calls()
        except OSError as error:
            self._lack("system calls stay allowed, seccomp", error)
        else:
            self._enforced.append("no system call but those of serving (seccomp)")
        line = "; ".join(self._enforced) if self._enforced else "nothing is enforced"
        if self._missing:
            log.warning("sandbox: %s. Not enforced here: %s", line, "; ".join(self._missing))
        else:
            log.info("sandbox: %s", line)

    def _lack(self, what: str, error: OSError | None) -> None:
        cause = what if error is None else f"{what}: {os.strerror(error.errno or 0)}"
        if self._mode == "require":
            raise OperatorError(
                "sandbox", f"it cannot be enforced here ({cause})", "Use --sandbox on, or another kernel"
            )
        self._missing.append(cause)


def _other_threads() -> int:
    """How many there are beside the caller. One that was joined a moment ago may still be on its way out."""
    for _ in range(PASSES):
        if (others := len(os.listdir("/proc/self/task")) - 1) == 0:
            break
        time.sleep(PASS_S)
    return others


def _described(confined: Confined, directories: Iterable[str]) -> list[str]:
    places = ", ".join(directories)
    files = "no file opened, made or run" + (f", removed only from {places}" if places else " or removed")
    said = [f"{files} (Landlock {confined.abi})"]
    if confined.tcp:
        said.append("no TCP")
    if confined.scopes:
        said.append("no signal to others")
    return said
