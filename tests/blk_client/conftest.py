"""Disks behind socket pairs, for the tests of the client. Whoever leaks a descriptor fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.frontend.conftest import Serve, nothing_leaks, serve

from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.transport import Transport

__all__ = ["nothing_leaks", "serve"]

SIZE = 8 << 20
WAIT_S = 10.0

Disk = Callable[[], Transport]


@pytest.fixture
def disk(serve: Serve) -> Transport:
    """A memory disk of 8 MiB with four queues; its serial is ``from the test``."""
    return serve(BlockDevice(MemoryDisk(SIZE), num_queues=4, serial="from the test"))
