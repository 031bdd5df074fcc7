"""Reading back what was copied, against fingerprints that were taken on the way. Touches the sink it is given.

Fingerprints, because a stream cannot be read twice: 16 bytes for every step that is not zeroes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from hashlib import blake2b

from vhostuser.copying.sides import CHUNK, STEP, ZEROES, Sink, cut

Range = tuple[int, int]
"""Offset and length in bytes."""


class Fingerprints:
    """What every step of a copy must read as."""

    def __init__(self) -> None:
        self._taken: dict[int, bytes] = {}

    def take(self, offset: int, data: memoryview) -> None:
        """Remember one step, or the part of one with which a copy ends, that is not zeroes."""
        self._taken[offset] = fingerprint(data)

    def holds(self, offset: int, data: memoryview) -> bool:
        """Whether ``data`` is what was remembered; zeroes where nothing was."""
        taken = self._taken.get(offset)
        return bytes(data) == ZEROES[: len(data)] if taken is None else fingerprint(data) == taken


def fingerprint(data: memoryview) -> bytes:
    """16 bytes that no other data has by chance."""
    return blake2b(data, digest_size=16).digest()


def verify(
    sink: Sink, size: int, fingerprints: Fingerprints, failed: Sequence[Range], advanced: Callable[[int], None]
) -> list[Range]:
    """Read ``size`` bytes back and return where they are not what was copied, to `STEP` bytes.

    ``failed`` is known to differ and left out. ``advanced`` hears how many bytes were looked at. Raises what reading
    raises.
    """
    different: list[Range] = []
    under_way: deque[tuple[int, int, Future[bytes]]] = deque()

    def compare() -> None:
        offset, length, future = under_way.popleft()
        view = memoryview(future.result())
        for at, part in cut(offset, length, STEP):
            if not fingerprints.holds(at, view[at - offset : at - offset + part]) and not overlaps(failed, at, part):
                add(different, at, part)
        advanced(length)

    for offset, length in cut(0, size, CHUNK):
        under_way.append((offset, length, sink.begin(offset, length)))
        if len(under_way) >= sink.window:
            compare()
    while under_way:
        compare()
    return different


def overlaps(ranges: Sequence[Range], offset: int, length: int) -> bool:
    """Whether any range has a byte in common with this one."""
    return any(start < offset + length and offset < start + size for start, size in ranges)


def add(ranges: list[Range], offset: int, length: int) -> None:
    """Append a range, to the last one where it follows."""
    if ranges and sum(ranges[-1]) == offset:
        offset, length = ranges[-1][0], ranges[-1][1] + length
        ranges.pop()
    ranges.append((offset, length))
