"""Fixtures of the interop tests: QEMU's tools with libblkio from Debian sid, and images served by us."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.guest.backends import Export, Ours
from tests.guest.packages import PackagesError
from tests.guest.prepare import OFFERS, Qemu

LIMIT_S: Final = 300.0

Serve = Callable[..., Ours]


@dataclass(frozen=True)
class Tools:
    """``qemu-img`` and ``qemu-io`` that reach a vhost-user-blk back-end through libblkio."""

    qemu: Qemu

    def attempt(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program and return what it did."""
        command = [*self.qemu.command(program), *words]
        environment = {**os.environ, **self.qemu.environment()}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT_S)

    def run(self, program: str, *words: str) -> str:
        """Run a program and return its output; fails the test when it fails."""
        done = self.attempt(program, *words)
        assert done.returncode == 0, f"{program} {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def io(self, disk: str, *commands: str) -> str:
        """Run ``qemu-io`` commands on a disk; fails the test when one fails, which qemu-io says but in text."""
        said = self.run("qemu-io", "--image-opts", disk, *(word for command in commands for word in ("-c", command)))
        assert "failed" not in said.lower(), said
        assert "error" not in said.lower(), said
        return said


@pytest.fixture(scope="session")
def tools() -> Tools:
    """The tools, when they have been prepared."""
    offer = OFFERS["sid"]
    if not offer.ready():
        pytest.skip("QEMU's tools with libblkio are not here: run `make interop`")
    try:
        return Tools(offer.fetch())
    except PackagesError as error:
        pytest.skip(str(error))


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name (sockets live in it), for one test."""
    directory = Path(tempfile.mkdtemp(prefix="vhi-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def serve(place: Path) -> Iterator[Serve]:
    """Serve an image with our back-end: ``serve(image, queues=4, ...)`` with the fields of `Export`."""
    with ExitStack() as stack:
        yield lambda image, **export: stack.enter_context(Ours(image, place, Export(**export)))


def disk_of(backend: Ours) -> str:
    """The image options with which QEMU's tools reach a disk that we serve."""
    return f"driver=virtio-blk-vhost-user,path={backend.socket},cache.direct=on,discard=unmap"
