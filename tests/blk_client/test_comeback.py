"""Back-ends that die with requests in flight, and those that come after them: nothing is lost, nothing sent twice.

The back-ends are fakes with books of their own (`tests.frontend.books`), so that what goes over the wire and what is in
the rings can be looked at.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.blk_client.conftest import WAIT_S
from tests.frontend import fakes
from tests.frontend.books import Books
from tests.frontend.fakes import FakeBackend, Ring, carry_out

import vhostuser
from vhostuser import Backoff, BlockClient, Flush, Read, Write

QUICK = Backoff(first_s=0.001, most_s=0.01, give_up_s=WAIT_S)
SHORT = Backoff(first_s=0.001, most_s=0.01, give_up_s=0.2)
TRACKING = fakes.ALL & ~fakes.BACKEND_REQ | fakes.INFLIGHT
FEATURES = fakes.SEG_MAX | fakes.BLK_SIZE | fakes.FLUSH | fakes.VERSION_1 | fakes.PROTOCOL

Device = Callable[[FakeBackend, Ring], None]


class Mortal:
    """Takes ``takes`` requests, gives back those of the numbers ``answers``, in that order, and dies.

    The last of them is given back as far as ``until`` only; the driver is called before it, and not for it.
    """

    def __init__(self, takes: int, answers: Sequence[int] = (), until: str = "cleared") -> None:
        self.taken: list[int] = []
        self.answered: list[int] = []
        self.died = threading.Event()
        self._takes, self._answers, self._until = takes, answers, until
        self._books: Books | None = None

    def __call__(self, backend: FakeBackend, ring: Ring) -> None:
        books = self._books = self._books or Books(backend, ring)
        self.taken += books.replayed
        books.replayed = []
        while len(self.taken) < self._takes and (head := books.take()) is not None:
            self.taken.append(head)
        if len(self.taken) < self._takes:
            return
        for number in self._answers:
            head, last = self.taken[number], number == self._answers[-1]
            if last:
                backend.call(ring)
            books.put(head, carry_out(backend, ring, head), until=self._until if last else "cleared")
            self.answered.append(head)
        backend.hang_up()
        self.died.set()


class Heir:
    """A good disk that goes on where another one stopped: what it took over, and what it took itself, by head."""

    def __init__(self) -> None:
        self.replayed: list[int] = []
        self.taken: list[int] = []
        self.began_at: int | None = None
        self._books: Books | None = None

    def __call__(self, backend: FakeBackend, ring: Ring) -> None:
        if self._books is None:
            self._books = Books(backend, ring)
            self.replayed, self.began_at = self._books.replayed, ring.base
            for head in self.replayed:
                self._books.put(head, carry_out(backend, ring, head))
        while (head := self._books.take()) is not None:
            self.taken.append(head)
            self._books.put(head, carry_out(backend, ring, head))
        backend.call(ring)


class Stage:
    """Back-ends at one path, and clients of them, which leave first."""

    def __init__(self, path: str, backends: ExitStack, clients: ExitStack) -> None:
        self.path = path
        self._backends, self._clients = backends, clients

    def backend(self, device: Device, **options: Any) -> FakeBackend:
        """The next one to be connected to. It tracks what is in flight, unless ``options`` say otherwise."""
        options = {"protocol": TRACKING, "features": FEATURES} | options
        return self._backends.enter_context(FakeBackend(path=self.path, device=device, **options))

    def client(self, *, reconnect: Backoff | None = QUICK, **options: Any) -> BlockClient:
        """One that comes again."""
        return self._clients.enter_context(vhostuser.connect(self.path, reconnect=reconnect, **options))


@pytest.fixture
def stage(nothing_leaks: None, tmp_path: Path) -> Iterator[Stage]:
    """Nobody is there yet."""
    with ExitStack() as backends, ExitStack() as clients:
        yield Stage(str(tmp_path / "disk.sock"), backends, clients)


def exceptions(futures: Sequence[Future[Any]]) -> list[BaseException | None]:
    """How the calls ended, once all have."""
    assert not wait(futures, WAIT_S).not_done
    return [future.exception() for future in futures]


def avail_index(backend: FakeBackend, index: int = 0) -> int:
    """How many chains the driver has made available in all."""
    ring = backend.rings[index]
    return int(struct.unpack_from("<H", backend.at(ring.avail, 4, user=True), 2)[0])


@pytest.mark.parametrize("until", ["linked", "used", "cleared"])
def test_what_is_under_way_is_answered_by_the_back_end_that_comes(stage: Stage, until: str) -> None:
    mortal, heir = Mortal(12, [3, 7, 1], until), Heir()
    first = stage.backend(mortal)
    client = stage.client()
    second = stage.backend(heir)
    first.disk[:] = second.disk[:] = bytes(range(256)) * (len(first.disk) // 256)
    reads = client.submit_all(Read(512 * number, 1024) for number in range(6))
    writes = client.submit_all(Write(65536 + 512 * number, bytes([number + 1]) * 512) for number in range(6))
    assert exceptions([*reads, *writes]) == [None] * 12
    assert all(future.result() == bytes(range(256)) * 4 for future in reads)

    published = {"linked": 2, "used": 3, "cleared": 3}[until]
    answered = mortal.answered[:published]
    assert heir.replayed == [head for head in mortal.taken if head not in answered], "in their order, and no other"
    assert heir.taken == []
    assert heir.began_at == 12
    assert avail_index(second) == 12, "nothing was made available twice"
    assert client.copied_bytes == 6 * 1024 + 6 * 512, "nor copied"
    for number in range(6):
        sectors = {bytes(disk[65536 + 512 * number :][:512]) for disk in (first.disk, second.disk)}
        assert bytes([number + 1]) * 512 in sectors
    assert client.connected


def test_the_very_same_region_and_rings_are_handed_over(stage: Stage) -> None:
    mortal, heir = Mortal(4, [2]), Heir()
    first = stage.backend(mortal, queues=2)
    client = stage.client(queues=2, queue_size=32)
    second = stage.backend(heir, queues=2)
    assert exceptions(client.submit_all([Read(0, 512)] * 4, queue=0)) == [None] * 4

    asked, told = first.payloads(fakes.GET_INFLIGHT_FD), first.payloads(fakes.SET_INFLIGHT_FD)
    assert struct.unpack_from("=HH", asked[0], 16) == (2, 32)
    assert struct.unpack("=QQHH4x", told[0]) == (2 * 576, 0, 2, 32)
    assert second.payloads(fakes.GET_INFLIGHT_FD) == []
    assert second.payloads(fakes.SET_INFLIGHT_FD) == told
    assert second.region_file == first.region_file
    for request in (fakes.SET_VRING_NUM, fakes.SET_VRING_ADDR, fakes.SET_VRING_KICK, fakes.SET_VRING_ENABLE):
        assert second.payloads(request) == first.payloads(request)
    assert [struct.unpack("=II", base) for base in second.payloads(fakes.SET_VRING_BASE)] == [(0, 1), (1, 0)]
    assert second.memory[0][:3] == first.memory[0][:3]
    order = [request for request in second.requests if request in (2, 37, 32, 8, 10, 9, 13, 14, 12, 18)]
    assert order == [2, 32, 37, *(8, 10, 9, 13, 14, 12) * 2, 18, 18]


def test_what_is_asked_while_nobody_is_there_is_answered_once_by_who_comes(stage: Stage) -> None:
    mortal, heir = Mortal(1), Heir()
    stage.backend(mortal)
    client = stage.client(queue_size=16)
    futures = [client.submit(Read(0, 512))]
    assert mortal.died.wait(WAIT_S)
    with client.allocate(512) as buffer:
        futures += client.submit_all([Write(512, buffer), Flush(), *(Read(0, 512) for _ in range(100))])
        assert not any(future.done() for future in futures)
        second = stage.backend(heir)
        assert exceptions(futures) == [None] * 103
    assert heir.replayed == mortal.taken
    assert len(heir.taken) == 102
    assert avail_index(second) == 103
