"""What a disk may hold, as far as whoever drives it can know. Pure.

Each write has a number of its own and fills its blocks with one word of eight bytes that tells the block and the
number. A block may hold what an acknowledged write left or what a write under way brings, never what was overwritten by
a write that began later and was acknowledged.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

BLOCK: Final = 4096
_WORD: Final = struct.Struct("<Q")
_NUMBER_BITS: Final = 40


class Violation(AssertionError):  # noqa: N818 - what it is, whoever sees it
    """The disk holds what it cannot hold; the text says where and what."""


def content(block: int, number: int) -> bytes:
    """What write ``number`` leaves in ``block``; number 0 is a fresh disk."""
    return bytes(BLOCK) if number == 0 else _WORD.pack(block << _NUMBER_BITS | number) * (BLOCK // _WORD.size)


@dataclass(slots=True)
class _Block:
    possible: set[int] = field(default_factory=lambda: {0})
    under_way: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class WriteUnderWay:
    """A write that was sent; goes back to `Model.written` or `Model.failed`."""

    block: int
    number: int
    data: bytes
    buries: frozenset[int]
    """What cannot be in the block any more once this write is acknowledged."""


@dataclass(slots=True, eq=False)
class ReadUnderWay:
    """A read that was sent; goes back to `Model.check`."""

    block: int
    allowed: set[int]
    quiet: bool
    """Nothing was being written there meanwhile."""


class Model:
    """All that is known of a disk of zeroes."""

    def __init__(self, blocks: int) -> None:
        self.blocks: Final = [_Block() for _ in range(blocks)]
        self._reads: set[ReadUnderWay] = set()
        self._next = 1

    def write(self, at: int) -> WriteUnderWay:
        """A write of one block is sent now."""
        block, number = self.blocks[at], self._next
        self._next += 1
        write = WriteUnderWay(at, number, content(at, number), frozenset(block.possible - block.under_way))
        block.possible.add(number)
        block.under_way.add(number)
        for read in self._reads:
            if read.block == at:
                read.allowed.add(number)
                read.quiet = False
        return write

    def written(self, write: WriteUnderWay) -> None:
        """It was acknowledged."""
        block = self.blocks[write.block]
        block.possible -= write.buries
        block.under_way.discard(write.number)

    def failed(self, write: WriteUnderWay) -> None:
        """It failed, and may have happened or not; nothing can come of it any more."""
        self.blocks[write.block].under_way.discard(write.number)

    def read(self, at: int) -> ReadUnderWay:
        """A read of one block is sent now."""
        block = self.blocks[at]
        read = ReadUnderWay(at, set(block.possible), not block.under_way)
        self._reads.add(read)
        return read

    def forget(self, read: ReadUnderWay) -> None:
        """The read failed."""
        self._reads.discard(read)

    def check(self, read: ReadUnderWay, data: bytes) -> None:
        """The read brought ``data``. Raises `Violation`."""
        self._reads.discard(read)
        number = judge(read.block, data, read.allowed, quiet=read.quiet)
        if read.quiet and number is not None:
            # What was read with nothing else going on stays until something is written.
            self.blocks[read.block].possible &= {number}

    def check_image(self, image: bytes) -> None:
        """The bytes of the disk itself, with nothing under way. Raises `Violation`."""
        for at, block in enumerate(self.blocks):
            judge(at, image[BLOCK * at : BLOCK * (at + 1)], block.possible, quiet=not block.under_way)


def judge(at: int, data: bytes, allowed: set[int], *, quiet: bool) -> int | None:
    """The number of the write that ``data`` is from, all over; None while writes may be mixed. Raises `Violation`."""
    if len(data) != BLOCK:
        raise Violation(f"block {at} came as {len(data)} bytes")
    words = set(_WORD.iter_unpack(data))
    found = set()
    for (word,) in words:
        number = 0 if word == 0 else word & (1 << _NUMBER_BITS) - 1
        if number not in allowed or (word and word >> _NUMBER_BITS != at):
            what = "zeroes" if word == 0 else f"write {number} of block {word >> _NUMBER_BITS}"
            raise Violation(f"block {at} holds {what}, and may hold {sorted(allowed)}")
        found.add(number)
    if len(found) > 1:
        if quiet:
            raise Violation(f"block {at} is torn: it holds the writes {sorted(found)}")
        return None
    return found.pop()
