"""Fixtures: images, back-ends of every kind that end with the test, and what a test may leave behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.guest.backends import Backend, Export, NotSupportedError
from tests.peers.daemons import Unavailable, starter
from tests.peers.stubs.backend import Script, StubBackend

SIZE = 8 << 20

Serve = Callable[..., Backend]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name (sockets live in it), for one test."""
    directory = Path(tempfile.mkdtemp(prefix="vhp-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What ends with the test, in the reverse order of its start."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def image(place: Path) -> Path:
    """An image of 8 MiB of random bytes."""
    path = place / "disk.img"
    path.write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
    return path


@pytest.fixture
def serve(place: Path, stack: ExitStack) -> Serve:
    """Serve an image: ``serve("qsd-10.0", image, queues=4)``; the test is skipped when that peer is not here."""

    def start(name: str, image: Path, **export: object) -> Backend:
        try:
            return stack.enter_context(starter(name)(image, place, Export(**export)))  # type: ignore[arg-type]
        except (Unavailable, NotSupportedError) as error:
            pytest.skip(str(error))

    return start


@pytest.fixture
def stub(place: Path, stack: ExitStack) -> Callable[[Script], StubBackend]:
    """A stub that runs until the test ends."""
    return lambda script: stack.enter_context(StubBackend(script, place / f"stub{len(os.listdir(place))}.sock"))
