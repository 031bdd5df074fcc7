"""A load that verifies itself: reads, writes and flushes through our client, each answer held against the model."""

from __future__ import annotations

import random
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Final

from tests.survival.model import BLOCK, Model, ReadUnderWay, Violation, WriteUnderWay

from vhostuser.blk.client import BlockClient
from vhostuser.blk.requests import Flush, Read, Request, Write
from vhostuser.errors import PeerGone, RemoteProtocolError

NARROW: Final = 16
"""Most requests go to so many blocks: where they meet."""
CLEAR: Final = (PeerGone, RemoteProtocolError)
Sent = WriteUnderWay | ReadUnderWay | None


class Load:
    """One thread's load on one disk of zeroes. ``tracked``: no call may fail, whatever happens to back-ends."""

    def __init__(self, disk: BlockClient, blocks: int, depth: int, seed: int, *, tracked: bool = True) -> None:
        self.model: Final = Model(blocks)
        self.answered = 0
        self.failed = 0
        self._disk = disk
        self._depth = depth
        self._chance = random.Random(seed)
        self._tracked = tracked
        self._under_way: dict[Future[Any], Sent] = {}

    def fill(self) -> None:
        """Send requests, in one go, until ``depth`` are under way."""
        chosen = [self._choose() for _ in range(self._depth - len(self._under_way))]
        if not chosen:
            return
        try:
            futures = self._disk.submit_all(request for request, _ in chosen)
        except CLEAR:
            for _, sent in chosen:
                self._fail(sent)
            return
        self._under_way.update((future, sent) for future, (_, sent) in zip(futures, chosen, strict=True))

    def _choose(self) -> tuple[Request, Sent]:
        blocks = len(self.model.blocks)
        at = self._chance.randrange(blocks if self._chance.random() < 0.25 else min(blocks, NARROW))
        kind = self._chance.random()
        if kind < 0.6:
            write = self.model.write(at)
            return Write(BLOCK * at, write.data), write
        if kind < 0.95:
            return Read(BLOCK * at, BLOCK), self.model.read(at)
        return Flush(), None

    def settle(self, limit_s: float) -> int:
        """Wait until some calls end, ``limit_s`` at most, and judge them; returns how many did."""
        done = wait(self._under_way, limit_s, FIRST_COMPLETED).done
        for future in done:
            sent = self._under_way.pop(future)
            error = future.exception()
            if error is not None:
                if self._tracked or not isinstance(error, CLEAR):
                    raise Violation(f"a request was lost: {error!r}") from error
                self._fail(sent)
                continue
            self.answered += 1
            if isinstance(sent, WriteUnderWay):
                self.model.written(sent)
            elif sent is not None:
                self.model.check(sent, future.result())
        return len(done)

    def _fail(self, sent: Sent) -> None:
        if self._tracked:
            raise Violation("a request was refused although its back-end tracks what is in flight")
        self.failed += 1
        if isinstance(sent, WriteUnderWay):
            self.model.failed(sent)
        elif sent is not None:
            self.model.forget(sent)

    def finish(self, limit_s: float) -> None:
        """Send nothing more, judge what is under way. Raises `Violation` when nothing ends for ``limit_s``."""
        while self._under_way:
            if not self.settle(limit_s):
                raise Violation(f"{len(self._under_way)} requests are lost: no answer within {limit_s:g} s")

    def read_all(self) -> None:
        """Read and judge every block, one after the other."""
        for at in range(len(self.model.blocks)):
            read = self.model.read(at)
            self.model.check(read, self._disk.read(BLOCK * at, BLOCK))
