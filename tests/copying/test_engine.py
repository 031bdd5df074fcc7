"""The copy, between memory that fails where the test says."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostuser.copying import CHUNK, Copy, FileSide, Fingerprints, Outcome, verify
from vhostuser.copying.engine import MAX_FAILURES
from vhostuser.copying.sides import STEP, Piece, cut, done
from vhostuser.errors import OperatorError, PeerGone, UsageError
from vhostuser.fds import Fd

GRAIN = 4096


class Memory:
    """Bytes, of which some fail to be read or written."""

    readable = True
    window = 3

    def __init__(self, data: bytearray, bad: set[int] | None = None, *, error: Exception | None = None) -> None:
        """``bad`` blocks of `GRAIN` fail with ``error``, or EIO."""
        self.name = "memory"
        self.grain = GRAIN
        self.zero_step = CHUNK
        self.data = data
        self.bad = bad or set()
        self.error = error or OSError(errno.EIO, "broken")
        self.prepared = False
        self.finished = False
        self.zeroed = 0

    @property
    def size(self) -> int:
        return len(self.data)

    capacity = size

    def pieces(self) -> Iterator[Piece]:
        for at, length in cut(0, len(self.data), CHUNK):
            yield at, length, True

    def prepare(self, size: int | None) -> None:
        self.prepared = True

    def begin(self, offset: int, length: int) -> Future[bytes]:
        return self._try(offset, length, bytes(self.data[offset : offset + length]))

    def begin_write(self, offset: int, data: object) -> Future[None]:
        view = memoryview(data)  # type: ignore[arg-type]
        future = self._try(offset, len(view), None)
        if future.exception() is None:
            self.data[offset : offset + len(view)] = view
        return future

    def begin_zero(self, offset: int, length: int) -> Future[None]:
        self.zeroed += length
        return self.begin_write(offset, bytes(length))

    def finish(self, size: int) -> None:
        self.finished = True

    def close(self) -> None:
        pass

    def _try(self, offset: int, length: int, result: bytes | None) -> Future[object]:  # type: ignore[misc]
        if any(offset < (block + 1) * GRAIN and block * GRAIN < offset + length for block in self.bad):
            future: Future[object] = Future()
            future.set_exception(self.error)
            return future
        return done(result)


def content(size: int, step: int = 3) -> bytearray:
    """Random bytes and zeroes, in runs of ``step`` times 64 KiB."""
    data = bytearray(os.urandom(size))
    for at in range(0, size, 2 * step * STEP):
        data[at : at + step * STEP] = bytes(min(step * STEP, size - at))
    return data


def test_everything_is_copied_and_zeroes_are_made_not_written() -> None:
    source, sink = Memory(content(5 * CHUNK + 1000)), Memory(bytearray(b"\xff" * 6 * CHUNK))
    told: list[int] = []
    outcome = Copy(source, sink, advanced=told.append).run()
    assert sink.data[: source.size] == source.data
    assert set(sink.data[source.size :]) == {0xFF}
    assert outcome.size == source.size == sum(told)
    assert outcome.data + sink.zeroed == source.size
    assert sink.zeroed > 2 * CHUNK
    assert sink.finished


def test_what_does_not_fit_is_refused_before_anything_is_touched() -> None:
    sink = Memory(bytearray(CHUNK))
    with pytest.raises(UsageError, match=f"it takes {CHUNK} bytes, and memory has {CHUNK + 1}"):
        Copy(Memory(bytearray(CHUNK + 1)), sink).run()
    assert not sink.prepared


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 3 * CHUNK // GRAIN - 1), max_size=6), st.booleans())
def test_exactly_the_blocks_that_fail_are_left_out_and_named(bad: set[int], reading: bool) -> None:
    source = Memory(content(3 * CHUNK), bad if reading else None)
    sink = Memory(bytearray(b"\xee" * 3 * CHUNK), None if reading else bad)
    outcome = Copy(source, sink).run()
    assert named(outcome) == bad
    assert {one.verb for one in outcome.failures} <= {"read" if reading else "written"}
    for block in range(3 * CHUNK // GRAIN):
        place = slice(block * GRAIN, block * GRAIN + GRAIN)
        expected = b"\xee" * GRAIN if block in bad else source.data[place]
        assert sink.data[place] == expected


def named(outcome: Outcome) -> set[int]:
    assert all(one.offset % GRAIN == 0 and one.length % GRAIN == 0 for one in outcome.failures)
    return {
        at // GRAIN for one in outcome.failures for at in range(one.offset, one.offset + one.length, GRAIN)
    }  # fmt: skip


def test_adjacent_failures_are_one_range() -> None:
    outcome = Copy(Memory(content(CHUNK), {7, 8, 9}), Memory(bytearray(CHUNK))).run()
    assert [(one.offset, one.length) for one in outcome.failures] == [(7 * GRAIN, 3 * GRAIN)]


@pytest.mark.parametrize("bad", [set(range(0, 4 * CHUNK // GRAIN, 2)), set(range(8 * CHUNK // GRAIN))])
def test_storage_that_fails_all_over_is_given_up(bad: set[int]) -> None:
    outcome = Copy(Memory(content(8 * CHUNK), bad), Memory(bytearray(8 * CHUNK))).run()
    assert outcome.gave_up
    assert len(outcome.failures) <= MAX_FAILURES


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PeerGone("the back-end has gone"), "memory: the back-end has gone; it was at"),
        (OSError(errno.ENOSPC, "No space left on device"), "memory: No space left on device; it was at .*Make room"),
    ],
)
def test_what_stops_a_copy_says_where_it_was(error: Exception, said: str) -> None:
    sink = Memory(bytearray(4 * CHUNK), {2 * CHUNK // GRAIN}, error=error)
    with pytest.raises(OperatorError, match=said):
        Copy(Memory(content(4 * CHUNK)), sink).run()


@pytest.mark.parametrize("wrong_at", [0, STEP - 1, 7 * STEP, 2 * CHUNK - 1])
def test_verifying_finds_a_changed_byte_in_data_and_in_zeroes(wrong_at: int) -> None:
    source, sink = Memory(content(2 * CHUNK)), Memory(bytearray(2 * CHUNK))
    fingerprints = Fingerprints()
    Copy(source, sink, fingerprints=fingerprints).run()
    assert verify(sink, source.size, fingerprints, [], lambda _: None) == []
    sink.data[wrong_at] ^= 1
    assert verify(sink, source.size, fingerprints, [], lambda _: None) == [(wrong_at - wrong_at % STEP, STEP)]
    assert verify(sink, source.size, fingerprints, [(wrong_at, 1)], lambda _: None) == []


def opened(path: Path, size: int) -> FileSide:
    path.touch()
    os.truncate(path, size)
    return FileSide(str(path), Fd(os.open(path, os.O_RDWR)))


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 1023), max_size=8), st.integers(0, 4095))
def test_pieces_of_a_file_hold_all_data_once_and_begin_at_steps(
    tmp_path_factory: pytest.TempPathFactory, blocks: set[int], tail: int
) -> None:
    path = tmp_path_factory.mktemp("file") / "sparse"
    side = opened(path, 4 * CHUNK + tail)
    with path.open("r+b") as file:
        for block in blocks:
            file.seek(block * GRAIN)
            file.write(b"x" * GRAIN)
    pieces = list(side.pieces())
    assert [at for at, _, _ in pieces] == [
        sum(length for _, length, _ in pieces[:place]) for place in range(len(pieces))
    ]
    assert sum(length for _, length, _ in pieces) == 4 * CHUNK + tail
    assert all(at % STEP == 0 for at, _, _ in pieces)
    data = {at for start, length, data in pieces if data for at in range(start, start + length, GRAIN)}
    assert {block * GRAIN for block in blocks} <= data
    side.close()


def test_a_copy_of_a_sparse_file_is_as_sparse(tmp_path: Path) -> None:
    source = opened(tmp_path / "a", 64 * CHUNK)
    os.pwrite(source._fd.fileno(), b"y" * CHUNK, 20 * CHUNK + 3 * GRAIN)
    sink = FileSide.sink(str(tmp_path / "b"))
    Copy(source, sink).run()
    sink.close()
    source.close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "b").stat().st_blocks * 512 <= 3 * CHUNK


def test_a_file_that_is_replaced_loses_what_was_in_it(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"old" * CHUNK)
    sink = FileSide.sink(str(tmp_path / "b"))
    Copy(Memory(bytearray(CHUNK) + b"new"), sink).run()
    sink.close()
    assert (tmp_path / "b").read_bytes() == bytes(CHUNK) + b"new"


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    source = opened(tmp_path / "a", 2 * CHUNK)
    (tmp_path / "a").write_bytes(b"z" * CHUNK)
    with pytest.raises(OSError, match="the file ends at"):
        source.begin(CHUNK - 1, 2).result()
    source.close()
