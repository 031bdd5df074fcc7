"""The region of a back-end's books of requests in flight, as the host side holds it. Touches one descriptor.

The host side only keeps it: it asks the first back-end for one, and shows it to every later one that takes over the
same rings. What is in it is between back-ends (vhost-user: Inflight I/O tracking).
"""

from __future__ import annotations

import os
import stat
from typing import Final

from vhostuser.errors import RemoteProtocolError
from vhostuser.fds import Fd
from vhostuser.protocol import Inflight, Reply

HEADER_BYTES: Final = 16
ENTRY_BYTES: Final = 16
"""What a split ring needs at least: a header, and one entry for each descriptor. How far rings are apart is each
back-end's own affair."""


class HostInflight:
    """The region of one set of rings. It owns the descriptor: `close` it, or give it to `HostDevice.start`.

    It is of use for the very rings that it was made for, with the same features, and until they are stopped with
    everything answered.
    """

    def __init__(self, fd: Fd, payload: Inflight, features: int) -> None:
        """Takes ``fd``. ``payload`` is what SET_INFLIGHT_FD says of it, ``features`` are those that the rings use."""
        self.fd: Final = fd
        self.payload: Final = payload
        self.features: Final = features
        self.left = 0
        """How many requests an orderly stop left in it, which the bases of the queues count as fetched; 0 also when the
        connection was lost, and nobody knows."""

    def read(self) -> bytes:
        """What is in it now, to be looked at. Raises `OSError` when that cannot be read."""
        return os.pread(self.fd.fileno(), self.payload.mmap_size, self.payload.mmap_offset)

    def close(self) -> None:
        """Give it up: requests in flight are lost then. Idempotent."""
        self.fd.close()

    def __repr__(self) -> str:
        told = self.payload
        return f"HostInflight({told.num_queues} queues of {told.queue_size}, {told.mmap_size} bytes)"


def received(reply: Reply[Fd], asked: Inflight, features: int) -> HostInflight | None:
    """The region that came as ``reply`` to what was ``asked``; None when the back-end has none.

    The sizes that were asked for stay those of the region, as with QEMU: not every back-end repeats them. Takes the
    descriptor. Raises `RemoteProtocolError` for a region that cannot hold what it is for.
    """
    answer = reply.payload
    if not isinstance(answer, Inflight) or not answer.mmap_size:
        for fd in reply.fds:
            fd.close()
        return None
    (fd,) = reply.fds
    try:
        _check(fd, answer, asked)
    except BaseException:
        fd.close()
        raise
    told = Inflight(answer.mmap_size, answer.mmap_offset, asked.num_queues, asked.queue_size)
    return HostInflight(fd, told, features)


def _check(fd: Fd, answer: Inflight, asked: Inflight) -> None:
    least = asked.num_queues * (HEADER_BYTES + ENTRY_BYTES * asked.queue_size)
    if answer.mmap_size < least:
        raise RemoteProtocolError(
            f"GET_INFLIGHT_FD was answered with {answer.mmap_size} bytes, and {asked.num_queues} queues of "
            f"{asked.queue_size} take {least} at least"
        )
    file = os.fstat(fd.fileno())
    if not stat.S_ISREG(file.st_mode):
        raise RemoteProtocolError("GET_INFLIGHT_FD was answered with a descriptor that is no file")
    if answer.mmap_offset + answer.mmap_size > file.st_size:
        raise RemoteProtocolError(
            f"GET_INFLIGHT_FD was answered with {answer.mmap_size} bytes at {answer.mmap_offset} of a file that has "
            f"{file.st_size}"
        )
