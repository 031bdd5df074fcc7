"""The copy itself: much under way at once, zeroes left out, failures narrowed down. Touches the sides it is given."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from vhostuser.copying.sides import CHUNK, STEP, ZEROES, Side, Sink, Source, cut
from vhostuser.copying.verify import Fingerprints
from vhostuser.errors import OperatorError, RequestFailed, UsageError, VhostUserError

MAX_FAILURES: Final = 16
"""After so many failed ranges a copy gives up,"""

MAX_FAILED: Final = 1024
"""and after so many blocks that were tried one by one: storage that fails everywhere takes very long to say so."""

LOCAL: Final = frozenset({errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EILSEQ})
"""Errors of storage that concern the bytes asked for, and no others."""


@dataclass(slots=True)
class Failure:
    """A range that was not copied."""

    side: str
    verb: str  # "read" or "written"
    offset: int
    length: int
    cause: str


@dataclass(slots=True)
class Outcome:
    """What became of a copy."""

    size: int = 0
    """Bytes it reached, from the start."""
    data: int = 0
    """Bytes of them that were written as data."""
    failures: list[Failure] = field(default_factory=list)
    gave_up: bool = False
    """Whether there were too many failures to go on."""


STEP_OF_ZEROES: Final = bytes(STEP)


class GaveUp(Exception):  # noqa: N818 - the end of the loop
    """There were too many failures."""


class Copy:
    """One copy from a source to a sink. For one thread."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        *,
        fingerprints: Fingerprints | None = None,
        advanced: Callable[[int], None] = lambda _: None,
    ) -> None:
        """``fingerprints`` are taken of what is read; ``advanced`` hears how many bytes were done."""
        self.outcome = Outcome()
        self._source = source
        self._sink = sink
        self._fingerprints = fingerprints
        self._advanced = advanced
        self._reads: deque[tuple[int, int, Future[bytes]]] = deque()
        self._writes: deque[tuple[int, int, memoryview | None, Future[None]]] = deque()
        self._ended = False  # a stream, at its end
        self._failed = 0  # blocks

    def run(self) -> Outcome:
        """Copy everything. Ranges that storage fails are left out and told; everything else goes on.

        Raises `UsageError` before anything is written when it does not fit, `OperatorError` for what stops the copy.
        """
        self._check_fit(self._source.size)
        self._sink.prepare(self._source.size)
        try:
            self._pump()
        except GaveUp:
            self.outcome.gave_up = True
        with self._guard(self._sink, self.outcome.size):
            self._sink.finish(self.outcome.size)
        return self.outcome

    def _check_fit(self, size: int | None) -> None:
        capacity = self._sink.capacity
        if size is not None and capacity is not None and size > capacity:
            raise UsageError(
                self._sink.name,
                f"it takes {capacity} bytes, and {self._source.name} has {size}",
                "Make it larger, or copy less; nothing was written",
            )

    def _pump(self) -> None:
        for offset, length, data in self._source.pieces():
            if data:
                with self._guard(self._source, offset):
                    self._reads.append((offset, length, self._source.begin(offset, length)))
                if len(self._reads) >= self._source.window:
                    self._take_read()
            else:
                self._zero(offset, length)
            if self._ended:
                break
        while self._reads:
            self._take_read()
        while self._writes:
            self._take_write()

    def _take_read(self) -> None:
        offset, length, future = self._reads.popleft()
        try:
            with self._guard(self._source, offset):
                data = future.result()
        except OSError as error:
            self._narrow(self._source, offset, length, error, self._reread)
            return
        if len(data) < length:
            self._ended = True
        if data:
            self._emit(offset, data)

    def _reread(self, offset: int, length: int) -> None:
        with self._guard(self._source, offset):
            data = self._source.begin(offset, length).result()
        self._emit(offset, data)

    def _emit(self, offset: int, data: bytes) -> None:
        """Write ``data``, and the zeroes in it as such."""
        if self._sink.capacity is not None and offset + len(data) > self._sink.capacity:
            raise OperatorError(
                self._sink.name,
                f"{self._source.name} has more than the {self._sink.capacity} bytes that it takes",
                f"Make it larger, or copy less; {offset} bytes were written",
            )
        view = memoryview(data)
        start, zero = 0, False  # of the run that goes on
        for at, part in cut(offset, len(data), STEP):
            here = at - offset
            is_zero = _zeroes_at(data, here, part)
            if not is_zero and self._fingerprints is not None:
                self._fingerprints.take(at, view[here : here + part])
            if is_zero is not zero and here:
                self._put(offset + start, view[start:here], zero=zero)
                start = here
            zero = is_zero
        self._put(offset + start, view[start:], zero=zero)

    def _put(self, offset: int, view: memoryview, *, zero: bool) -> None:
        if zero:
            self._zero(offset, len(view))
            return
        self.outcome.data += len(view)
        with self._guard(self._sink, offset):
            future = self._sink.begin_write(offset, view)
        self._began(offset, len(view), view, future)

    def _zero(self, offset: int, length: int) -> None:
        for at, part in cut(offset, length, self._sink.zero_step):
            with self._guard(self._sink, at):
                future = self._sink.begin_zero(at, part)
            self._began(at, part, None, future)

    def _began(self, offset: int, length: int, view: memoryview | None, future: Future[None]) -> None:
        self._writes.append((offset, length, view, future))
        if len(self._writes) >= 2 * self._sink.window:
            self._take_write()

    def _take_write(self) -> None:
        offset, length, view, future = self._writes.popleft()
        try:
            with self._guard(self._sink, offset):
                future.result()
        except OSError as error:
            self._rewrite(offset, length, view, error)
        self.outcome.size = max(self.outcome.size, offset + length)
        self._advanced(length)

    def _rewrite(self, offset: int, length: int, view: memoryview | None, error: OSError) -> None:
        """What could not be written, in smaller parts; what could not be zeroed, as data first."""

        def again(at: int, part: int) -> None:
            data = memoryview(ZEROES)[:part] if view is None else view[at - offset : at - offset + part]
            with self._guard(self._sink, at):
                self._sink.begin_write(at, data).result()

        if view is not None:
            self._narrow(self._sink, offset, length, error, again)
            return
        for at, part in cut(offset, length, CHUNK):
            try:
                again(at, part)
            except OSError as worse:
                self._narrow(self._sink, at, part, worse, again)

    def _narrow(self, side: Side, offset: int, length: int, error: OSError, again: Callable[[int, int], None]) -> None:
        """Find out which part of a range it is that fails, by halves, and do the rest."""
        grain = max(self._source.grain, self._sink.grain)  # parts of one block of the sink would overwrite each other
        if length <= grain:
            self._record(side, offset, length, error)
            return
        half = -(-length // 2 // grain) * grain
        for at, part in ((offset, half), (offset + half, length - half)):
            if not part:
                continue
            try:
                again(at, part)
            except OSError as worse:
                self._narrow(side, at, part, worse, again)

    def _record(self, side: Side, offset: int, length: int, error: OSError) -> None:
        cause = error.strerror or str(error)
        verb = "read" if side is self._source else "written"
        failures = self.outcome.failures
        last = failures[-1] if failures else None
        if last is not None and (last.side, last.offset + last.length) == (side.name, offset):
            last.length += length
        else:
            failures.append(Failure(side.name, verb, offset, length, cause))
        if side is self._source:
            self._advanced(length)
        self._failed += 1
        if len(failures) >= MAX_FAILURES or self._failed >= MAX_FAILED:
            raise GaveUp

    @contextmanager
    def _guard(self, side: Side, offset: int) -> Iterator[None]:
        """What concerns these bytes alone stays an `OSError`; what stops the copy says where it was."""
        try:
            yield
        except (OperatorError, BrokenPipeError, RequestFailed):
            raise
        except VhostUserError as error:
            cause = f"{str(error).rstrip('.')}; it was at {offset} bytes"
            raise OperatorError(side.name, cause, "Check the program behind the socket, and copy again") from error
        except OSError as error:
            if error.errno in LOCAL:
                raise
            reason = error.strerror or os.strerror(error.errno or 0)
            advice = "Make room, and copy again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Copy again"
            raise OperatorError(side.name, f"{reason}; it was at {offset} bytes", advice) from error


def _zeroes_at(data: bytes, at: int, length: int) -> bool:
    return data.startswith(STEP_OF_ZEROES if length == STEP else STEP_OF_ZEROES[:length], at)
