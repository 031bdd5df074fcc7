"""A pipe or terminal as an end of a copy: one byte after the other, no way back. Touches its descriptor."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import count
from typing import TYPE_CHECKING, Final

from vhostuser.copying.sides import CHUNK, ZEROES, Piece, done

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class StreamSource:
    """Bytes that come in their order, until they end."""

    def __init__(self, name: str, fd: int) -> None:
        """``fd`` stays the caller's."""
        self.name: Final = name
        self.size: Final = None
        self.window: Final = 1
        self.grain: Final = CHUNK
        self._fd = fd

    def pieces(self) -> Iterator[Piece]:
        """One chunk after the other, for ever."""
        return ((offset, CHUNK, True) for offset in count(0, CHUNK))

    def begin(self, offset: int, length: int) -> Future[bytes]:
        """The next ``length`` bytes, or what is left. Blocks until they are there."""
        parts: list[bytes] = []
        while length and (part := os.read(self._fd, length)):
            parts.append(part)
            length -= len(part)
        return done(b"".join(parts))

    def close(self) -> None:
        """Nothing is ours."""


class StreamSink:
    """Takes bytes in their order."""

    def __init__(self, name: str, fd: int) -> None:
        """``fd`` stays the caller's."""
        self.name: Final = name
        self.capacity: Final = None
        self.window: Final = 1
        self.grain: Final = CHUNK
        self.zero_step: Final = CHUNK
        self.readable: Final = False
        self._fd = fd
        self._at = 0

    def prepare(self, size: int | None) -> None:
        """Any size will do."""

    def begin(self, offset: int, length: int) -> Future[bytes]:
        """Not from here."""
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE), self.name)

    def begin_write(self, offset: int, data: ReadableBuffer) -> Future[None]:
        """Write now; blocks until everything is taken. Raises EIO when something before it was left out."""
        if offset != self._at:
            raise OSError(errno.ESPIPE, "what comes before it could not be copied, and a stream goes on in order")
        view = memoryview(data)
        while view:
            written = os.write(self._fd, view)
            self._at += written
            view = view[written:]
        return done(None)

    def begin_zero(self, offset: int, length: int) -> Future[None]:
        """Zeroes like any other bytes."""
        return self.begin_write(offset, memoryview(ZEROES)[:length])

    def finish(self, size: int) -> None:
        """Everything was taken."""

    def close(self) -> None:
        """Nothing is ours."""
