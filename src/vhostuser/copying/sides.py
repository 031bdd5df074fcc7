"""What a copy asks of what it copies from and to. Touches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHUNK: Final = 1 << 20
"""How much is read at once, in bytes."""

STEP: Final = 1 << 16
"""The least run of zeroes that is not written as data, in bytes, and what a fingerprint is of."""

ZEROES: Final = bytes(CHUNK)

Piece = tuple[int, int, bool]
"""Offset and length in bytes, and whether there may be anything but zeroes."""

T = TypeVar("T")


class Side(Protocol):
    """Either end. All offsets are in bytes from where the copy begins."""

    @property
    def name(self) -> str:
        """What a person calls it."""

    @property
    def grain(self) -> int:
        """The least that can fail by itself, in bytes."""

    @property
    def window(self) -> int:
        """How many chunks are worth having under way."""

    def close(self) -> None:
        """Let go of it. Idempotent."""


class Source(Side, Protocol):
    """What is copied."""

    @property
    def size(self) -> int | None:
        """How much there is, in bytes; None for a stream, which tells by its end."""

    def pieces(self) -> Iterator[Piece]:
        """Everything there is, in order, data in pieces of a chunk at most. Without an end for a stream.

        Each begins at a multiple of `STEP`.
        """

    def begin(self, offset: int, length: int) -> Future[bytes]:
        """Read. A stream ends with less than ``length``."""


class Sink(Side, Protocol):
    """Where it is copied to."""

    @property
    def capacity(self) -> int | None:
        """How much it takes, in bytes; None when that is not known."""

    @property
    def zero_step(self) -> int:
        """How many zeroes are one request, in bytes."""

    @property
    def readable(self) -> bool:
        """Whether `begin` can read back what was written."""

    def prepare(self, size: int | None) -> None:
        """Make ready for ``size`` bytes. Nothing is written before."""

    def begin(self, offset: int, length: int) -> Future[bytes]:
        """Read back."""

    def begin_write(self, offset: int, data: ReadableBuffer) -> Future[None]:
        """Write ``data``, which stays as it is until that is done."""

    def begin_zero(self, offset: int, length: int) -> Future[None]:
        """Make ``length`` bytes read as zeroes."""

    def finish(self, size: int) -> None:
        """Make all ``size`` bytes durable."""


def cut(offset: int, length: int, step: int) -> Iterator[tuple[int, int]]:
    """Offset and length of the parts of a range that end at multiples of ``step``."""
    end = offset + length
    while offset < end:
        stop = min(end, offset - offset % step + step)
        yield offset, stop - offset
        offset = stop


def done(result: T) -> Future[T]:
    """A future of what is there already."""
    future: Future[T] = Future()
    future.set_result(result)
    return future
