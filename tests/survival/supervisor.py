"""Starts a back-end by any command, kills it, and starts it again. Touches processes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.guest.processes import Child

ROOT: Final = Path(__file__).resolve().parent.parent.parent
STEPPING: Final = ROOT / "build" / "stepping"
"""A package `vhostuser` whose native module has the step points; see `stepping_package`."""
END_S: Final = 30.0


class Supervisor:
    """Keeps one back-end running; whatever still runs is killed when the block ends."""

    def __init__(self, command: Sequence[str], directory: Path, environment: Mapping[str, str] | None = None) -> None:
        """``command`` serves the same disk on the same socket each time."""
        self.command = list(command)
        self.log: Final = directory / "backend.log"
        self.kills = 0
        self._environment = dict(environment or {})
        self._dying: list[Child] = []
        self.child: Child | None = None

    def start(self, environment: Mapping[str, str] | None = None) -> Child:
        """Start one; it need not be ready when this returns."""
        assert self.child is None, "there is one"
        self.child = Child("the back-end", self.command, self.log, {**self._environment, **(environment or {})})
        return self.child

    def kill(self, *, hurry: bool = False) -> None:
        """Kill it where it stands. ``hurry``: return before it has ended."""
        assert self.child is not None, "there is none"
        self.child.signal(signal.SIGKILL)
        self.lost(hurry=hurry)

    def lost(self, *, hurry: bool = False) -> None:
        """It was killed, or is about to kill itself: nothing but SIGKILL may have ended it."""
        assert self.child is not None, "there is none"
        self._dying.append(self.child)
        self.child = None
        self.kills += 1
        while len(self._dying) > int(hurry):
            child = self._dying.pop(0)
            status = child.wait(END_S)
            child.close()
            assert status == -signal.SIGKILL, f"the back-end ended by itself with {status}: {child.tail()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in [*self._dying, *filter(None, [self.child])]:
            child.close()


def ours(image: Path | str, socket: Path, *options: str) -> list[str]:
    """The command that serves ``image`` with `vhostuser serve`."""
    return [sys.executable, "-m", "vhostuser.cli", "serve", str(image), "--socket", str(socket), *options]


def stepping_package() -> str | None:
    """Build the native module with step points into `STEPPING`; returns why that is impossible here, or None.

    The package there is this tree's, but for that module: put first on the path of a process, it is served by it.
    """
    if shutil.which("cargo") is None:
        return "cargo is not here"
    target = ROOT / "native" / "target" / "stepping"
    command = ["cargo", "build", "--quiet", "--locked", "--profile", "quick", "-p", "vhostuser-py"]
    command += ["--features", "pyo3/extension-module,steps", "--target-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT / "native", capture_output=True, text=True, check=False)
    if done.returncode:
        return f"it does not build: {done.stderr.strip()[-1000:]}"
    package = STEPPING / "vhostuser"
    shutil.rmtree(STEPPING, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / "src" / "vhostuser").iterdir():
        if not entry.name.startswith("_native.abi3"):
            (package / entry.name).symlink_to(entry)
    shutil.copy(target / "quick" / "lib_native.so", package / "_native.abi3.so")
    return None


class Moments:
    """When to kill: after some answers, after some time, or at once."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def next(self) -> tuple[int, float]:
        """After how many answers, and how many seconds after those."""
        if self._chance.random() < 0.25:
            return 0, 0.3 * self._chance.random()  # while it starts
        return self._chance.randrange(1, 400), 0.004 * self._chance.random()

    def hurry(self) -> bool:
        """Whether its successor starts at once."""
        return self._chance.random() < 0.5


def search_path(*first: Path) -> str:
    """A PYTHONPATH with these directories first."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])
