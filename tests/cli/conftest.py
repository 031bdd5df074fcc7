"""How the tests of the commands run them: as real processes, the way a person or a manager does."""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

MODULES = {"vhostuser": "vhostuser.cli.main", "vhost-user-blk": "vhostuser.cli.vhost_user_blk"}
WAIT_S = 60.0
"""For a busy machine; nothing waits that long when all is well."""


def command_line(program: str, *arguments: str) -> list[str]:
    """The words that start ``program`` from this source tree, with the interpreter of the tests."""
    return [sys.executable, "-m", MODULES[program], *arguments]


def environment() -> dict[str, str]:
    """The environment for it: the sources of this tree first, and no notice to the manager that runs the tests."""
    kept = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET" and not key.startswith("LISTEN_")}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PYTHONWARNINGS": "error"}


@pytest.fixture
def run() -> Run:
    """Runs a program to its end: ``run("vhostuser", "stats", ...)``."""

    def runner(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(program, *arguments),
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    return runner


@contextmanager
def file_system_in_memory(where: Path, size: str) -> Iterator[Path]:
    """A directory with room for ``size`` only. Skips the test where nobody may mount."""
    if os.geteuid() != 0:
        pytest.skip("a file system that fills up has to be mounted: only root may")
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], check=True)
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


class Serving:
    """A program that serves a disk: started, ready, and killed at the latest when the test ends."""

    _numbers = itertools.count()

    def __init__(
        self, words: list[str], directory: Path, *, variables: Mapping[str, str], pass_fds: Sequence[int]
    ) -> None:
        """Starts it and waits for its ready notice. Raises `AssertionError` with its log when it ends before."""
        number = next(self._numbers)
        self._log = directory / f"serve{number}.log"
        place = directory / f"notify{number}"
        place.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as self._notices, self._log.open("w") as log:
            self._notices.bind(str(place))
            self.process = subprocess.Popen(
                words,
                env={**environment(), "NOTIFY_SOCKET": str(place), **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=pass_fds,
            )
            ended = os.pidfd_open(self.process.pid)
            try:
                ready = select.select([self._notices.fileno(), ended], [], [], WAIT_S)[0]
                assert self._notices.fileno() in ready, self.log
                assert self._notices.recv(64) == b"READY=1"
            except BaseException:
                self.kill()
                raise
            finally:
                os.close(ended)

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        return self._log.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends it a signal and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        """Ends it whatever it does."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Starts a program that serves: ``serving("serve", "disk.img", ...)``, or with ``program="vhost-user-blk"``."""
    started: list[Serving] = []

    def start(
        *arguments: str,
        program: str = "vhostuser",
        words: list[str] | None = None,
        variables: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Serving:
        line = words if words is not None else command_line(program, *arguments)
        started.append(Serving(line, tmp_path, variables=variables or {}, pass_fds=pass_fds))
        return started[-1]

    yield start
    for one in started:
        one.kill()
