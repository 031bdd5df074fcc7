"""Descriptors of every kind that a peer may send. Touches what they stand for."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import tempfile
from collections.abc import Callable

from tests.fuzz.messages import MEMORY


class Descriptors:
    """Makes descriptors, and closes all that it owns in the end."""

    def __init__(self) -> None:
        self._owned: list[int] = []

    def own(self, fd: int) -> int:
        """Takes ``fd`` over, and returns it."""
        self._owned.append(fd)
        return fd

    def close(self) -> None:
        """Closes everything."""
        for fd in self._owned:
            os.close(fd)

    def kinds(self) -> tuple[Callable[[], int], ...]:
        """One maker for each kind."""
        return (
            lambda: self.own(os.memfd_create("small")),
            self.null,
            lambda: self.own(os.open("/dev/zero", os.O_RDONLY)),
            lambda: self.own(os.open("/", os.O_RDONLY)),
            lambda: self.own(os.open("/", os.O_PATH)),
            lambda: self.own(os.open("/proc/self/mem", os.O_RDWR)),
            lambda: self.own(os.pidfd_open(os.getpid())),
            lambda: self.pipe(0),
            lambda: self.pipe(1),
            self.full,
            self.pair,
            self.listener,
            self.epoll,
            self.file,
            self.sealed,
            self.fixed,
            self.vast,
        )

    def full(self) -> int:
        fd = self.own(os.eventfd(0))
        os.eventfd_write(fd, 2**64 - 2)
        return fd

    def pipe(self, end: int) -> int:
        ends = os.pipe2(os.O_NONBLOCK)
        os.close(ends[1 - end])
        return self.own(ends[end])

    def null(self) -> int:
        return self.own(os.open("/dev/null", os.O_RDWR))

    def epoll(self) -> int:
        with select.epoll() as made:
            return self.own(os.dup(made.fileno()))

    def listener(self) -> int:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("")  # some abstract name
            made.listen()
            return self.own(os.dup(made.fileno()))

    def vast(self) -> int:
        """More than there is memory in the machine; nothing of it is touched."""
        fd = self.own(os.memfd_create("vast"))
        os.ftruncate(fd, 1 << 40)
        return fd

    def fixed(self) -> int:
        """A file that cannot change its size any more, as QEMU makes them."""
        fd = self.own(os.memfd_create("fixed", os.MFD_ALLOW_SEALING))
        os.ftruncate(fd, MEMORY)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        return fd

    def pair(self) -> int:
        one, two = socket.socketpair()
        self.own(two.detach())
        return self.own(one.detach())

    def file(self) -> int:
        with tempfile.TemporaryFile() as file:
            file.truncate(MEMORY)
            return self.own(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY))

    def sealed(self) -> int:
        fd = self.own(os.memfd_create("sealed", os.MFD_ALLOW_SEALING))
        os.ftruncate(fd, MEMORY)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        return fd
