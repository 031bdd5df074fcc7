"""Fixtures: a place for sockets and images, and storage that outlives the process that uses it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.survival.slowfs import CannotMountError, SlowDisk

SLOW_SIZE = 1 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name (sockets live in it), for one test."""
    directory = Path(tempfile.mkdtemp(prefix="vhk-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def slow_disk(place: Path) -> Iterator[SlowDisk]:
    """A mounted file whose writes the test may hold; the test is skipped where nobody may mount."""
    mount_point = place / "slow"
    mount_point.mkdir()
    try:
        disk = SlowDisk(mount_point, SLOW_SIZE)
    except CannotMountError as error:
        pytest.skip(f"storage that outlives a process needs a mount: {error}")
    with disk:
        yield disk
