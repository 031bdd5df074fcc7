"""Back-ends killed where they stand: every call ends in time, in a result that is right or in a clear error."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from tests.guest.processes import Deadline
from tests.peers.conftest import Serve
from tests.peers.forge import Forge

import vhostuser
from vhostuser.blk.client import BlockClient
from vhostuser.blk.requests import Flush, Read, Request, Write, WriteZeroes
from vhostuser.errors import PeerGone, RemoteProtocolError
from vhostuser.frontend import Backoff

BLOCK: Final = 4096
BLOCKS: Final = 256
ENDS_S: Final = 5.0  # what a call may still take once the back-end is dead
LIMIT_S: Final = 30.0
CLEAR: Final = (PeerGone, RemoteProtocolError)
interop: Final = pytest.mark.interop


def content(number: int) -> bytes:
    """What is written to a block, if anything is: so that whatever is read can be judged."""
    return number.to_bytes(4, "little") * (BLOCK // 4)


def right(number: int, data: bytes) -> bool:
    """Whether this can have been read from block ``number``."""
    return data in (content(number), bytes(BLOCK))


def some_request(chance: random.Random) -> tuple[int, Request]:
    """A request and its block, or -1."""
    number = chance.randrange(BLOCKS)
    kind = chance.random()
    if kind < 0.5:
        return number, Read(BLOCK * number, BLOCK)
    if kind < 0.9:
        return -1, Write(BLOCK * number, content(number))
    return -1, Flush() if kind < 0.97 else WriteZeroes(BLOCK * number, BLOCK)


def open_now() -> dict[int, str]:
    """The descriptors of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


@pytest.fixture
def unchanged() -> Iterator[None]:
    """Afterwards there are no more threads and descriptors than before."""
    gc.collect()
    before = open_now()
    threads = set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert [link for fd, link in open_now().items() if fd not in before] == []


class Killer:
    """Kills on a thread of its own: ``delay_s`` after ``answers`` requests were answered, or after the start."""

    def __init__(self, kill: Callable[[], None], answers: int, delay_s: float) -> None:
        self._kill = kill
        self._left = answers
        self._delay_s = delay_s
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.killed_at: float | None = None
        self.answered = 0
        self.cut_short = 0
        self.count(0)
        self._thread.start()

    def count(self, answers: int) -> None:
        """So many more were answered. Any thread; it does not matter when two count as one."""
        self.answered += answers
        if self.answered >= self._left:
            self._ready.set()

    def _run(self) -> None:
        self._ready.wait()
        threading.Event().wait(self._delay_s)
        self._kill()
        self.killed_at = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether it has killed."""
        return not self._thread.is_alive()

    def check(self) -> None:
        """Whoever calls it has just seen its last call end."""
        now = time.monotonic()
        self._ready.set()
        self._thread.join()
        assert self.killed_at is not None
        assert now - self.killed_at < ENDS_S + Deadline(ENDS_S).left_s, "a call outlived the back-end for too long"


def use_by_threads(path: Path, chance: random.Random, killer: Killer) -> None:
    """Requests in batches and alone, from two threads, until they fail."""
    failures: list[BaseException] = []

    def alone(disk: BlockClient, seed: float) -> None:
        own = random.Random(seed)
        try:
            while True:
                number = own.randrange(BLOCKS)
                disk.write(BLOCK * number, content(number))
                assert right(number, disk.read(BLOCK * number, BLOCK))
                killer.count(2)
        except CLEAR:
            return
        except BaseException as error:
            failures.append(error)

    with contextlib.suppress(*CLEAR, vhostuser.OperatorError), vhostuser.connect(path, queues=2) as disk:
        thread = threading.Thread(target=alone, args=(disk, chance.random()))
        thread.start()
        with contextlib.suppress(*CLEAR):
            while True:
                chosen = [some_request(chance) for _ in range(64)]
                futures = disk.submit_all(request for _, request in chosen)
                answered = settle([number for number, _ in chosen], futures)
                killer.count(answered)
                killer.cut_short += len(chosen) - answered
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        assert not disk.connected
        with pytest.raises(CLEAR):
            disk.read(0, BLOCK)
    assert not failures, failures


def settle(numbers: list[int], futures: list[Future[Any]]) -> int:
    """Every future ends, in a result that is right or in a clear error; returns how many had a result."""
    answered = 0
    for number, future in zip(numbers, futures, strict=True):
        error = future.exception(LIMIT_S)
        if error is None:
            assert number < 0 or right(number, future.result())
            answered += 1
        else:
            assert isinstance(error, CLEAR), repr(error)
            assert str(error)
    return answered


def use_by_tasks(path: Path, chance: random.Random, killer: Killer) -> None:
    """The same from tasks of an event loop."""

    async def task(disk: vhostuser.AsyncBlockClient, seed: float) -> None:
        own = random.Random(seed)
        with contextlib.suppress(*CLEAR):
            while True:
                number = own.randrange(BLOCKS)
                await disk.write(BLOCK * number, content(number))
                assert right(number, await disk.read(BLOCK * number, BLOCK))
                killer.count(2)

    async def scenario() -> None:
        try:
            disk = await vhostuser.connect_async(path, queues=2)
        except (*CLEAR, vhostuser.OperatorError):
            return
        async with disk:
            tasks = [task(disk, chance.random()) for _ in range(32)]
            await asyncio.wait_for(asyncio.gather(*tasks), LIMIT_S)

    asyncio.run(scenario())


def kill_again_and_again(times: int, make: Callable[[int], tuple[Path, Callable[[], None]]]) -> None:
    """``make`` starts a back-end and returns its socket and how to kill it; threads and tasks use them in turn.

    One in four is killed while it is connected to, or soon after, the others under load.
    """
    answered = cut_short = 0
    for number in range(times):
        chance = random.Random(number)
        path, kill = make(number)
        if number % 4 == 3:
            killer = Killer(kill, 0, 0.05 * chance.random())
        else:
            killer = Killer(kill, chance.randrange(1, 1000), 0.003 * chance.random())
        (use_by_threads if number % 3 else use_by_tasks)(path, chance, killer)
        answered += killer.answered
        cut_short += killer.cut_short
        killer.check()
    assert answered > 10 * times, "hardly a request came before the end"
    assert cut_short, "no request was under way at the end"


def of_forge(forge: Forge, place: Path) -> Callable[[int], tuple[Path, Callable[[], None]]]:
    """Our back-end on a memory disk."""

    def make(number: int) -> tuple[Path, Callable[[], None]]:
        path = place / f"{number}.sock"
        process = forge.make(path, f"memory:size={BLOCK * BLOCKS}")
        return path, partial(os.kill, process, signal.SIGKILL)

    return make


@pytest.mark.parametrize("times", [12, pytest.param(200, marks=interop)])
def test_every_call_ends_when_our_back_end_is_killed_at_some_point(times: int, place: Path, unchanged: None) -> None:
    with Forge() as forge:
        kill_again_and_again(times, of_forge(forge, place))


@interop
@pytest.mark.parametrize("name", ["qsd-7.2", "qsd-10.0", "qsd-11.1", "rust-vmm"])
def test_every_call_ends_when_another_back_end_is_killed_at_some_point(name: str, serve: Serve, image: Path) -> None:
    image.write_bytes(bytes(BLOCK * BLOCKS))

    def make(number: int) -> tuple[Path, Callable[[], None]]:
        backend = serve(name, image, queues=2)
        return backend.socket, lambda: backend.process.signal(signal.SIGKILL)

    kill_again_and_again(10, make)


@pytest.mark.parametrize("times", [4, pytest.param(40, marks=interop)])
def test_a_client_that_reconnects_goes_on_with_the_next_back_end(times: int, place: Path, unchanged: None) -> None:
    image = place / "disk.img"
    image.write_bytes(bytes(BLOCK * BLOCKS))
    path = place / "disk.sock"
    chance = random.Random(times)
    written: dict[int, int] = {}  # block -> the last generation that was acknowledged
    tried: dict[int, set[int]] = {}  # block -> generations that may or may not be there instead

    def mark(number: int, generation: int) -> bytes:
        return (number << 32 | generation).to_bytes(8, "little") * (BLOCK // 8)

    with Forge() as forge:
        process = forge.make(path, str(image))

        def kill_and_replace() -> None:
            nonlocal process
            os.kill(process, signal.SIGKILL)
            process = forge.make(path, str(image))

        patience = Backoff(first_s=0.01, most_s=0.05, give_up_s=LIMIT_S)
        with vhostuser.connect(path, reconnect=patience) as disk:
            for generation in range(1, times + 1):
                killer = Killer(kill_and_replace, chance.randrange(1, 1000), 0.003 * chance.random())
                while not killer.over:
                    chosen = chance.sample(range(BLOCKS), 16)
                    futures = disk.submit_all(Write(BLOCK * at, mark(at, generation)) for at in chosen)
                    for at, future in zip(chosen, futures, strict=True):
                        error = future.exception(LIMIT_S)
                        if error is None:
                            killer.count(1)
                            written[at] = generation
                            tried.pop(at, None)
                        else:
                            assert isinstance(error, CLEAR)
                            tried.setdefault(at, set()).add(generation)
                killer.check()
                for at in range(BLOCKS):
                    allowed = {written.get(at, 0), *tried.get(at, ())}
                    assert disk.read(BLOCK * at, BLOCK) in {mark(at, one) if one else bytes(BLOCK) for one in allowed}
