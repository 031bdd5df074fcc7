"""The in-flight region of a connection: handed out, and taken back from a front-end. Touches its memory.

It is the one thing that outlives a back-end and reaches the next one. Behind the parts of the queues it has room for
what else that one must know and no message will tell it.

Spec: vhost-user: Inflight I/O tracking.
"""

from __future__ import annotations

import logging
import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vhostuser._native import InflightRegion
from vhostuser.errors import SetupError
from vhostuser.fds import Fd

if TYPE_CHECKING:
    from vhostuser.backend.device import Device
    from vhostuser.protocol import Inflight

KEEPSAKE_BYTES: Final = 64
"""Room behind the parts of the queues, for what a successor has to know beside the requests."""

KEEPSAKE_HEAD: Final = struct.Struct("<8sII")
"""Before the keepsake: a mark, the virtio device type, the length."""

KEEPSAKE_MARK: Final = b"vhu-kept"

VERSION_OFFSET: Final = 8
"""Where the first part says, in two bytes, whether it was used before."""

log = logging.getLogger(__name__)


def make_region(device: Device, wanted: Inflight) -> tuple[Inflight, tuple[Fd, ...]]:
    """GET_INFLIGHT_FD: a region of zeroes. The front-end keeps it, and says with SET_INFLIGHT_FD when to use it.

    Returns the answer and the descriptor that goes with it, which is the caller's. Raises `SetupError`.
    """
    if wanted.num_queues > device.num_queues or wanted.queue_size > device.max_queue_size:
        raise SetupError(f"{wanted.num_queues} queues of {wanted.queue_size} are more than the device has")
    region = InflightRegion.create(wanted.num_queues, wanted.queue_size, spare=KEEPSAKE_BYTES)
    size = region.size + KEEPSAKE_BYTES
    return replace(wanted, mmap_size=size, mmap_offset=0), (Fd(os.dup(region.fd)),)


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


class Keepsake:
    """The spare bytes of a region that is ours: what a device says there, its successor reads. Touches the file."""

    def __init__(self, device: Device, region: InflightRegion, told: Inflight) -> None:
        """``told``: what SET_INFLIGHT_FD said of ``region``; one of another make has no room for it."""
        self._device = device
        self._region = region
        self._room = told.mmap_size >= region.size + KEEPSAKE_BYTES

    def recall(self) -> None:
        """Let the device have what a predecessor left here, if there was one."""
        if not self._room:
            return
        head, rest = self._read()
        if len(head) < KEEPSAKE_HEAD.size:
            return
        mark, device_id, length = KEEPSAKE_HEAD.unpack(head)
        if (mark, device_id) == (KEEPSAKE_MARK, self._device.device_id) and length <= len(rest):
            self._device.recall(rest[:length])

    def keep(self) -> None:
        """Write down what the device wants its successor to know."""
        kept = self._device.keepsake()
        if not kept or not self._room:
            return
        record = KEEPSAKE_HEAD.pack(KEEPSAKE_MARK, self._device.device_id, len(kept)) + kept
        try:
            os.pwrite(self._region.fd, record.ljust(KEEPSAKE_BYTES, b"\0"), self._place)
        except OSError as error:
            log.warning("%s: a successor will not know what it should: %s", self._device.name, error.strerror)

    @property
    def _place(self) -> int:
        return self._region.offset + self._region.size

    def _read(self) -> tuple[bytes, bytes]:
        try:
            found = os.pread(self._region.fd, KEEPSAKE_BYTES, self._place)
        except OSError:
            return b"", b""
        return found[: KEEPSAKE_HEAD.size], found[KEEPSAKE_HEAD.size :]
