"""A disk moves from one back-end to another while it is used: nobody notices but by the time it takes.

Our own back-ends serve the same storage on both sides; fakes are what forgets to log, refuses, or dies on the way.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.blk_client.conftest import SIZE, WAIT_S
from tests.frontend import fakes
from tests.frontend.fakes import FakeBackend, Hangup, Ring, carry_out

import vhostuser
from vhostuser import (
    Backoff,
    BlockClient,
    BlockDevice,
    Disk,
    MemoryDisk,
    MigrationFailed,
    PeerGone,
    SetupError,
    UsageError,
    VhostUserError,
    listen,
)
from vhostuser.backend import Server
from vhostuser.frontend import USABLE

QUICK = Backoff(first_s=0.001, most_s=0.01, give_up_s=WAIT_S)
MOVING = fakes.ALL & ~fakes.BACKEND_REQ | fakes.LOG_SHMFD
FEATURES = fakes.SEG_MAX | fakes.BLK_SIZE | fakes.FLUSH | fakes.VERSION_1 | fakes.PROTOCOL | fakes.LOG_ALL
PAGE = 4096


class Pair:
    """Two back-ends of our own that serve the same storage."""

    def __init__(self, where: Path) -> None:
        self.paths = [str(where / "one.sock"), str(where / "other.sock")]
        self.devices: list[BlockDevice] = []
        self._servers: list[Server] = []

    def serve(self, path: str, disk: Disk, **options: Any) -> None:
        device = BlockDevice(disk, **options)
        server = Server(device, listen(path))
        server.start()
        self.devices.append(device)
        self._servers.append(server)

    def end(self) -> None:
        for server, device in zip(self._servers, self.devices, strict=True):
            server.stop()
            assert server.join(WAIT_S)
            device.close()
        self._servers.clear()
        self.devices.clear()


@pytest.fixture
def pair(nothing_leaks: None, tmp_path: Path) -> Iterator[Pair]:
    """Both serve a memory disk of 8 MiB with four queues."""
    pair = Pair(tmp_path)
    disk = MemoryDisk(SIZE)
    for path in pair.paths:
        pair.serve(path, disk, num_queues=4, serial="moves")
    del disk
    yield pair
    pair.end()


class Load:
    """Threads that write and read their own part of the disk, copied and in place, until told to stop."""

    def __init__(self, client: BlockClient, threads: int = 4) -> None:
        self.client = client
        self.done = 0
        self._part = SIZE // threads
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        if self._failures:
            raise self._failures[0]

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        try:
            with self.client.allocate(8 * PAGE) as buffer:
                while not self._stop.is_set():
                    length = 512 * rng.randint(1, 16)
                    offset = number * self._part + 512 * rng.randrange((self._part - length) // 512)
                    data = rng.randbytes(length)
                    self.client.write(offset, data)
                    if rng.random() < 0.5:
                        assert self.client.read(offset, length) == data
                    else:
                        self.client.readinto(offset, buffer[512 : 512 + length])
                        assert buffer.view[512 : 512 + length] == data
                    self.done += 1
        except BaseException as error:
            self._failures.append(error)


@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("reconnect", [None, QUICK], ids=["plain", "reconnects"])
def test_a_disk_moves_there_and_back_under_load_and_no_call_notices(
    pair: Pair, queues: int, reconnect: Backoff | None
) -> None:
    with vhostuser.connect(pair.paths[0], queues=queues, reconnect=reconnect) as client, Load(client) as load:
        for turn in range(6):
            before, place = load.done, pair.paths[(turn + 1) % 2]
            moved = client.migrate(place, round_s=0.005, swap_log=turn % 3 == 0, leave=turn % 2 == 0)
            assert (moved.source, moved.destination) == (pair.paths[turn % 2], place)
            assert moved.differing == ()
            assert len(moved.rounds) == 6
            assert moved.rounds[0] > 0
            assert moved.copied_bytes == sum(moved.rounds) * PAGE
            assert 0 < moved.downtime_s <= moved.elapsed_s
            while load.done == before:
                client.read(0, 512)
        assert client.get_id() == "moves"
        assert client.connected


def test_tasks_of_an_event_loop_do_not_notice_either(pair: Pair) -> None:
    async def main() -> None:
        async with await vhostuser.connect_async(pair.paths[0], queues=4, reconnect=QUICK) as client:
            stop = False

            async def load(number: int) -> int:
                rng, done = random.Random(number), 0
                while not stop:
                    offset = number * (1 << 20) + 512 * rng.randrange(2000)
                    data = rng.randbytes(512 * rng.randint(1, 16))
                    await client.write(offset, data)
                    assert await client.read(offset, len(data)) == data
                    done += 1
                return done

            tasks = [asyncio.create_task(load(number)) for number in range(4)]
            for turn in range(4):
                moved = await client.migrate(pair.paths[(turn + 1) % 2], round_s=0.005, leave=turn < 2)
                assert moved.differing == ()
            with pytest.raises(MigrationFailed, match="the disk was not moved"):
                await client.migrate(pair.paths[0] + ".not")
            stop = True
            assert min(await asyncio.gather(*tasks)) > 0

    asyncio.run(main())


def test_a_disk_that_nobody_uses_moves_too(pair: Pair) -> None:
    with vhostuser.connect(pair.paths[0]) as client:
        moved = client.migrate(pair.paths[1], rounds=0)
        assert (moved.outstanding, moved.carried, moved.differing) == (0, 0, ())
        assert len(moved.rounds) == 2
        client.write(0, b"\1" * 512)
        with vhostuser.connect(pair.paths[0]) as other:
            assert other.read(0, 512) == b"\1" * 512, "the first back-end is free, and it is the same disk"


@pytest.mark.parametrize(
    ("options", "connect", "cause"),
    [
        ({"num_queues": 1}, {"queues": 2}, "1 queues and 2 were asked for"),
        ({"disk": MemoryDisk(SIZE // 2)}, {}, "its size in sectors"),
        ({"disk": MemoryDisk(SIZE, read_only=True)}, {}, "can only be read"),
    ],
)
def test_a_destination_that_does_not_fit_is_refused_and_the_source_goes_on(
    pair: Pair, tmp_path: Path, options: dict[str, Any], connect: dict[str, Any], cause: str
) -> None:
    lesser = str(tmp_path / "lesser.sock")
    pair.serve(lesser, options.pop("disk", None) or MemoryDisk(SIZE), **options)
    with vhostuser.connect(pair.paths[0], **connect) as client, Load(client) as load:
        with pytest.raises(MigrationFailed, match=cause) as told:
            client.migrate(lesser)
        assert str(told.value).startswith(f"{lesser}: the disk was not moved: ")
        before = load.done
        while load.done == before:
            client.read(0, 512)
        assert client.migrate(pair.paths[1]).differing == ()


def test_what_cannot_be_asked_is_refused_at_once(pair: Pair) -> None:
    with vhostuser.connect(pair.paths[0], reconnect=QUICK) as client:
        with pytest.raises(SetupError, match="0 to 10000 rounds"):
            client.migrate(pair.paths[1], rounds=-1)
        with pytest.raises(UsageError, match="cannot be connected to again"):
            client.migrate(7)
        refused: list[BaseException] = []

        def move(_: object) -> None:
            try:
                client.migrate(pair.paths[1])
            except BaseException as error:
                refused.append(error)

        client.submit(vhostuser.Read(0, 512)).add_done_callback(move)
        client.read(0, 512)
        while not refused:
            client.read(0, 512)
        assert isinstance(refused[0], SetupError)
        assert "callback" in str(refused[0])
    with vhostuser.connect(pair.paths[0], protocol_features=USABLE) as client:
        with pytest.raises(MigrationFailed, match="LOG_SHMFD was not negotiated"):
            client.migrate(pair.paths[1])
        assert client.read(0, 512) == bytes(512)


def test_a_client_that_is_closed_while_its_disk_moves_ends_the_move(pair: Pair) -> None:
    client = vhostuser.connect(pair.paths[0])
    ended: list[BaseException] = []

    def move() -> None:
        try:
            client.migrate(pair.paths[1], rounds=100, round_s=60)
        except VhostUserError as error:
            ended.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    client.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert "closed" in str(ended[0])


def test_a_write_cache_that_was_switched_off_is_off_at_the_destination(pair: Pair) -> None:
    with vhostuser.connect(pair.paths[0]) as client:
        client.set_write_cache(False)
        client.migrate(pair.paths[1])
        client.refresh()
        assert not client.write_cache
        client.set_write_cache(True)
        client.migrate(pair.paths[0])
        client.refresh()
        assert client.write_cache


def test_a_destination_with_a_larger_disk_is_told_as_a_change(pair: Pair, tmp_path: Path) -> None:
    larger = str(tmp_path / "larger.sock")
    pair.serve(larger, MemoryDisk(2 * SIZE), num_queues=4, serial="moves")
    with vhostuser.connect(pair.paths[0]) as client:
        client.migrate(larger)
        change = client.wait_config_change(WAIT_S)
        assert change is not None
        assert change.new.capacity == 2 * SIZE // 512
        assert client.size == 2 * SIZE


def test_who_reconnects_comes_back_to_where_the_disk_was_moved(pair: Pair, tmp_path: Path) -> None:
    with vhostuser.connect(pair.paths[0], reconnect=QUICK) as client:
        with FakeBackend(path=str(tmp_path / "fake"), features=FEATURES, protocol=MOVING | fakes.INFLIGHT) as fake:
            fake.space[:8] = (SIZE // 512).to_bytes(8, "little")
            with pytest.raises(MigrationFailed, match="does not offer what the rings use"):
                client.migrate(str(tmp_path / "fake"))
        client.migrate(pair.paths[1])
        for server in pair._servers:
            server.stop()
            assert server.join(WAIT_S)
        pair._servers.clear()
        disk = MemoryDisk(SIZE)
        devices, pair.devices = pair.devices, []
        pair.serve(pair.paths[1], disk, num_queues=4)
        assert client.read(0, 512) == bytes(512)
        for device in devices:
            device.close()


def forgetful(forgets: str) -> Callable[[FakeBackend, Ring], None]:
    """A disk that logs what it writes, but for one thing."""

    def serve(backend: FakeBackend, ring: Ring) -> None:
        while (head := backend.take(ring)) is not None:
            *data, status = [(at, length) for at, length, writable in backend.chain(ring, head) if writable]
            written = carry_out(backend, ring, head)
            if backend.acked & fakes.LOG_ALL:
                for what, pieces in (("data", data), ("status", [status])):
                    if what != forgets:
                        for at, length in pieces:
                            backend.mark(at, length)
            backend.put(ring, head, written)
            if ring.log is not None and forgets != "used":
                backend.mark(ring.log, 6 + 8 * ring.size)
        backend.call(ring)

    return serve


@contextmanager
def two_fakes(tmp_path: Path, **source: Any) -> Iterator[tuple[FakeBackend, FakeBackend]]:
    """The source has ``source`` for options; the destination is a good one."""
    options = {"features": FEATURES, "protocol": MOVING}
    with (
        FakeBackend(path=str(tmp_path / "one"), **options | {"device": forgetful("")} | source) as one,
        FakeBackend(path=str(tmp_path / "other"), **options) as other,
    ):
        other.disk = one.disk
        yield one, other


@pytest.mark.parametrize("forgets", ["data", "status", "used"])
@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_a_page_that_the_source_forgot_to_log_is_told(
    nothing_leaks: None, tmp_path: Path, forgets: str, in_place: bool, strict: bool
) -> None:
    with (
        two_fakes(tmp_path, device=forgetful(forgets)) as (one, _),
        vhostuser.connect(str(tmp_path / "one")) as client,
    ):
        client.write(0, b"\1" * 512)
        expected: set[int] = set()

        def use(*_: object) -> None:
            if in_place:
                with client.allocate(512) as buffer:
                    client.readinto(0, buffer)
            else:
                client.read(0, 512)
            chain = one.chains[-1]
            expected.add({"data": chain[1][0], "status": chain[2][0], "used": one.rings[0].log or 0}[forgets])

        if strict:
            with pytest.raises(MigrationFailed, match=r"written and not logged: guest address 0x") as told:
                moving(client, str(tmp_path / "other"), use)
            pages = told.value.pages
        else:
            pages = moving(client, str(tmp_path / "other"), use, strict=False).differing
        assert {page // PAGE for page in pages} >= {address // PAGE for address in expected}
        assert len(one.chains) == 2
        assert client.read(0, 512) == b"\1" * 512
        assert len(one.chains) == (3 if strict else 2), "it stays where it was, or has moved all the same"


def moving(client: BlockClient, place: str, use: Callable[[], None], **options: Any) -> vhostuser.Migration:
    """Move the disk, and use it once after the first round and before the last."""
    used = threading.Event()
    wait = client._closing.wait

    def round_of(timeout: float | None = None) -> bool:
        if not used.is_set():
            used.set()
            use()
        return wait(0)

    client._closing.wait = round_of  # type: ignore[method-assign]
    try:
        return client.migrate(place, rounds=2, **options)
    finally:
        client._closing.wait = wait  # type: ignore[method-assign]


def test_a_source_that_logs_everything_is_moved_from(nothing_leaks: None, tmp_path: Path) -> None:
    with two_fakes(tmp_path) as (one, other), vhostuser.connect(str(tmp_path / "one")) as client:
        moved = moving(client, str(tmp_path / "other"), lambda: (client.read(0, 512), None)[1])
        assert moved.differing == ()
        assert other.payloads(fakes.SET_VRING_BASE)[0][4:] == b"\1\0\0\0", "it goes on where the other one stopped"
        assert one.requests.count(fakes.SET_LOG_BASE) == 1
        client.read(0, 512)
        assert len(other.chains) == 1


@pytest.mark.parametrize("request_", [fakes.SET_FEATURES, fakes.ADD_MEM_REG, fakes.SET_VRING_KICK])
def test_a_destination_that_refuses_to_start_leaves_the_disk_where_it_was(
    nothing_leaks: None, tmp_path: Path, request_: int
) -> None:
    with two_fakes(tmp_path) as (one, other), vhostuser.connect(str(tmp_path / "one")) as client:
        other.answers[request_] = lambda _, received: fakes.u64(received.request, 1)
        client.write(0, b"\2" * 512)
        with pytest.raises(MigrationFailed, match="the disk was not moved"):
            client.migrate(str(tmp_path / "other"), rounds=1)
        assert client.read(0, 512) == b"\2" * 512
        assert one.requests[-1] != fakes.GET_VRING_BASE
        assert not one.acked & fakes.LOG_ALL, "and nothing is logged any more"


def test_a_source_that_dies_on_the_way_is_lost_as_ever(nothing_leaks: None, tmp_path: Path) -> None:
    with (
        two_fakes(tmp_path, answers={fakes.GET_VRING_BASE: lambda *_: Hangup()}),
        vhostuser.connect(str(tmp_path / "one")) as client,
    ):
        with pytest.raises(PeerGone):
            client.migrate(str(tmp_path / "other"), rounds=1)
        with pytest.raises(PeerGone):
            client.read(0, 512)


def test_a_source_that_does_not_log_is_told_so(nothing_leaks: None, tmp_path: Path) -> None:
    with (
        two_fakes(tmp_path, protocol=fakes.ALL & ~fakes.BACKEND_REQ),
        vhostuser.connect(str(tmp_path / "one")) as client,
    ):
        with pytest.raises(MigrationFailed, match="does not offer LOG_SHMFD"):
            client.migrate(str(tmp_path / "other"))
        client.read(0, 512)


def test_the_state_of_the_device_goes_along(nothing_leaks: None, tmp_path: Path) -> None:
    with (
        two_fakes(tmp_path, protocol=MOVING | fakes.DEVICE_STATE) as (one, other),
        vhostuser.connect(str(tmp_path / "one")) as client,
    ):
        other.protocol |= fakes.DEVICE_STATE
        one.state = b"what only it knows"
        assert client.migrate(str(tmp_path / "other")).state_bytes == len(one.state)
        assert other.state == one.state


def test_a_destination_that_does_not_want_the_state_leaves_the_disk_where_it_was(
    nothing_leaks: None, tmp_path: Path
) -> None:
    with (
        two_fakes(tmp_path, protocol=MOVING | fakes.DEVICE_STATE) as (one, other),
        vhostuser.connect(str(tmp_path / "one")) as client,
    ):
        other.protocol |= fakes.DEVICE_STATE
        one.state = b"damaged"
        other.answers[fakes.CHECK_DEVICE_STATE] = lambda *_: fakes.u64(43, 1)
        with pytest.raises(MigrationFailed, match="CHECK_DEVICE_STATE"):
            client.migrate(str(tmp_path / "other"))
        client.read(0, 512)
