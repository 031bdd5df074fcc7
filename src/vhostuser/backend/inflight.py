"""The in-flight region of a connection: handed out, and taken back from a front-end. Touches its memory.

Spec: vhost-user: Inflight I/O tracking.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vhostuser._native import InflightRegion
from vhostuser.errors import SetupError
from vhostuser.fds import Fd

if TYPE_CHECKING:
    from vhostuser.backend.device import Device
    from vhostuser.protocol import Inflight

VERSION_OFFSET: Final = 8
"""Where the first part says, in two bytes, whether it was used before."""

log = logging.getLogger(__name__)


def make_region(device: Device, wanted: Inflight) -> tuple[Inflight, tuple[Fd, ...]]:
    """GET_INFLIGHT_FD: a region of zeroes. The front-end keeps it, and says with SET_INFLIGHT_FD when to use it.

    Returns the answer and the descriptor that goes with it, which is the caller's. Raises `SetupError`.
    """
    if wanted.num_queues > device.num_queues or wanted.queue_size > device.max_queue_size:
        raise SetupError(f"{wanted.num_queues} queues of {wanted.queue_size} are more than the device has")
    region = InflightRegion.create(wanted.num_queues, wanted.queue_size)
    return replace(wanted, mmap_size=region.size, mmap_offset=0), (Fd(os.dup(region.fd)),)


def take_region(device: Device, told: Inflight, fd: Fd) -> InflightRegion:
    """SET_INFLIGHT_FD: what rings that start from now on go by. ``fd`` stays the caller's.

    Raises `SetupError` and `GuestMemoryError`.
    """
    region = InflightRegion(
        fd.fileno(),
        offset=told.mmap_offset,
        size=told.mmap_size,
        num_queues=told.num_queues,
        queue_size=told.queue_size,
    )
    if not device.fenced and any(os.pread(region.fd, 2, region.offset + VERSION_OFFSET)):
        log.warning(
            "%s: goes on where another one ended, without a lock: if that one was killed, its last requests may still "
            "reach storage after newer ones",
            device.name,
        )
    return region
