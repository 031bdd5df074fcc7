"""Child processes that never outlive the tests, and time limits that know how busy the machine is.

Touches: processes, their log files, the load average.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

TAIL_BYTES: Final = 3000
POLL_S: Final = 0.05  # a file cannot be waited for: how often one is looked at


class HasFileno(Protocol):
    """Something that can be waited for."""

    def fileno(self) -> int:
        """Its descriptor."""
        ...


class Deadline:
    """A time limit of ``seconds`` on an idle machine, stretched by the load average while it runs."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._start = time.monotonic()

    @property
    def left_s(self) -> float:
        """Seconds left, never below zero; asks for the load average anew."""
        busy = os.getloadavg()[0] / (os.cpu_count() or 1)
        return max(0.0, self._start + self._seconds * (1 + 2 * busy) - time.monotonic())


def readable(things: Sequence[HasFileno], limit_s: float) -> list[HasFileno]:
    """Those of ``things`` that are readable, waiting up to ``limit_s`` for the first."""
    ready, _, _ = select.select(list(things), [], [], limit_s)
    return ready


class ChildError(AssertionError):
    """A process of a test ended, or said something, that it should not have."""


class Child:
    """One child process with its output in a file; killed when the block ends, or when this process dies."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.log = log
        guarded = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*guarded, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                pass_fds=pass_fds,
            )
        self._pidfd = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def fileno(self) -> int:
        """A descriptor that becomes readable when the process ends."""
        return self._pidfd

    def tail(self) -> str:
        """The end of what it wrote."""
        return self.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")

    def wait_output(self, pattern: str, limit_s: float) -> str:
        """Wait until its output holds ``pattern`` and return what matched; raises `ChildError` when it never does."""
        deadline = Deadline(limit_s)
        while not (found := re.search(pattern, self.log.read_text(errors="replace"))):
            if readable([self], POLL_S) or not deadline.left_s:
                raise ChildError(f"{self.name} did not write `{pattern}`; its output ends: {self.tail()}")
        return found[0]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def wait(self, limit_s: float) -> int:
        """Wait for the end and return the exit status; raises `ChildError` when it takes too long."""
        if not readable([self], Deadline(limit_s).left_s):
            raise ChildError(f"{self.name} did not end within {limit_s} s; its output ends: {self.tail()}")
        return self._process.wait()

    def kill(self) -> None:
        """Kill it and collect its status; does nothing when it has ended."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Kill it when it still runs, and forget it; can be called twice."""
        self.kill()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
