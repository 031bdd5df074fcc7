"""What a hostile front-end can make a back-end hold: descriptors, memory, threads, time. All of it has an end."""

from __future__ import annotations

import gc
import mmap
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.backend.conftest import Serve
from tests.backend.fakes import FakeDevice
from tests.backend.frontend import WAIT_S, Frontend, GuestRam

from vhostuser.backend import Server
from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.protocol import (
    FrontendRequest,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    SingleRegion,
    VringFd,
)
from vhostuser.transport import Listener, Transport, listen

Req = FrontendRequest
TIMES = 200
"""More often than a leak of one descriptor each time could go unseen."""


def num_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def descriptor() -> Iterator[Callable[[], int]]:
    """Makes eventfds, and closes them at the end."""
    made: list[int] = []

    def make() -> int:
        made.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


@pytest.mark.parametrize("request_", [Req.SET_VRING_KICK, Req.SET_VRING_CALL, Req.SET_VRING_ERR])
def test_a_ring_s_descriptor_set_again_and_again_is_held_once(
    peer: Frontend, descriptor: Callable[[], int], request_: FrontendRequest
) -> None:
    peer.negotiate()
    fd = descriptor()
    peer.tell(request_, VringFd.of(0), [fd])
    before = num_fds()
    for _ in range(TIMES):
        peer.tell(request_, VringFd.of(0), [fd])
    assert num_fds() <= before + 1


def test_a_back_end_channel_opened_again_and_again_is_held_once(peer: Frontend) -> None:
    peer.negotiate()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer.do(Req.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        before = num_fds()
        for _ in range(TIMES):
            peer.do(Req.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        assert num_fds() <= before + 1


def test_a_region_that_comes_again_and_again_is_refused_and_not_kept(peer: Frontend) -> None:
    peer.negotiate()
    ram = GuestRam()
    ram.add(peer)
    before = num_fds()
    for _ in range(TIMES):
        assert peer.tell(Req.ADD_MEM_REG, SingleRegion(ram.region()), [ram.arena.fd]) != 0
    assert num_fds() <= before + 1


def test_a_table_of_memory_set_again_and_again_is_held_once(peer: Frontend) -> None:
    peer.negotiate()
    ram = GuestRam()
    ram.share(peer)
    before = num_fds()
    for _ in range(TIMES):
        ram.share(peer)
    assert num_fds() <= before + 1


@pytest.mark.parametrize("size", [1 << 46, 1 << 62, (1 << 64) - 4096])
def test_memory_beyond_the_end_of_its_file_is_refused_whatever_it_claims(peer: Frontend, size: int) -> None:
    peer.negotiate()
    ram = GuestRam()
    huge = MemoryRegion(0, size, 0x1000, 0)
    assert peer.tell(Req.SET_MEM_TABLE, MemoryTable((huge,)), [ram.arena.fd]) != 0
    assert peer.tell(Req.ADD_MEM_REG, SingleRegion(huge), [ram.arena.fd]) != 0
    ram.share(peer)


def test_a_sparse_file_as_memory_takes_none_of_ours(peer: Frontend) -> None:
    peer.negotiate()
    fd = os.memfd_create("sparse")
    try:
        os.ftruncate(fd, 1 << 40)
        peer.do(Req.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 1 << 40, 0x1000, 0),)), [fd])
        assert os.fstat(fd).st_blocks == 0
    finally:
        os.close(fd)


def not_memory(tmp_path: Path) -> dict[str, int]:
    """Descriptors of which none can be guest memory."""
    read, write = os.pipe()
    os.close(write)
    short = tmp_path / "short"
    short.write_bytes(bytes(100))
    return {
        "pipe": read,
        "socket": socket.socket(socket.AF_UNIX).detach(),
        "directory": os.open(tmp_path, os.O_RDONLY),
        "eventfd": os.eventfd(0),
        "null": os.open("/dev/null", os.O_RDWR),
        "read-only": os.open(short, os.O_RDONLY),
        "write-only": os.open(short, os.O_WRONLY),
        "path": os.open(short, os.O_PATH),
        "too short": os.open(short, os.O_RDWR),
    }


def test_what_is_no_memory_is_refused_and_closed(peer: Frontend, tmp_path: Path) -> None:
    peer.negotiate()
    kinds = not_memory(tmp_path)
    before = num_fds()
    region = MemoryRegion(0, mmap.PAGESIZE, 0x1000, 0)
    try:
        for kind, fd in kinds.items():
            assert peer.tell(Req.SET_MEM_TABLE, MemoryTable((region,)), [fd]) != 0, kind
            assert peer.tell(Req.ADD_MEM_REG, SingleRegion(region), [fd]) != 0, kind
        peer.barrier()  # what came with a message is closed after its answer
        assert num_fds() == before
    finally:
        for fd in kinds.values():
            os.close(fd)


def test_messages_that_are_refused_keep_no_descriptor(peer: Frontend, descriptor: Callable[[], int]) -> None:
    peer.negotiate()
    fd = descriptor()
    before = num_fds()
    for _ in range(TIMES):
        assert peer.tell(Req.SET_VRING_CALL, VringFd.of(99), [fd]) != 0
        peer.barrier()
    assert num_fds() == before


def test_descriptors_with_every_byte_of_a_message_end_the_connection(device: FakeDevice, serve: Serve) -> None:
    peer = serve(device)
    peer.negotiate()
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    before = num_fds()
    try:
        for byte in (1, 0, 0):  # GET_FEATURES, slowly
            socket.send_fds(peer.socket, [bytes([byte])], [fd] * 30)
        assert peer.closed_by_peer()
    except OSError:
        pass  # it hung up while we were sending
    finally:
        os.close(fd)
    wait_for(lambda: num_fds() <= before)


def wait_for(condition: Callable[[], bool]) -> None:
    """Look again until it holds: what another thread closes has no descriptor to wait for."""
    over = threading.Event()
    for _ in range(int(WAIT_S * 100)):
        if condition():
            return
        over.wait(0.01)
    raise AssertionError("it never came about")


def test_a_peer_that_asks_and_never_reads_is_let_go(device: FakeDevice) -> None:
    ours, theirs = socket.socketpair()
    server = Server(device, Transport(theirs, send_timeout_s=0.2), drain_timeout_s=0.2)
    server.start()
    with ours:
        ours.setblocking(False)
        question = b"".join(word.to_bytes(4, "little") for word in (Req.GET_FEATURES, 1, 0))
        ended = select.poll()
        ended.register(ours, select.POLLHUP)
        while not ended.poll(0):
            try:
                ours.send(question * 100)
            except BlockingIOError:
                assert select.select([], [ours], [], WAIT_S)[1], "the server holds on to it"
            except (BrokenPipeError, ConnectionResetError):
                break
        assert server.join(WAIT_S)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    """The socket of a server with a real disk."""
    where = str(tmp_path / "disk.sock")
    with MemoryDisk(1 << 20) as disk:
        device = BlockDevice(disk, num_queues=2)
        with Server(device, listen(where)):
            yield where
        device.close()


def test_a_flood_of_connections_is_turned_away_and_takes_nothing(place: str) -> None:
    with Frontend.connect(place) as first:
        first.negotiate()
        before = num_fds(), threading.active_count()
        idle = [socket.socket(socket.AF_UNIX) for _ in range(TIMES)]
        for one in idle:
            one.settimeout(WAIT_S)
            one.connect(place)
            assert one.recv(1) == b"", "it is told at once"
        first.barrier()
        for one in idle:
            one.close()
        wait_for(lambda: (num_fds(), threading.active_count()) == before)


def test_connections_that_come_and_go_leave_nothing(place: str) -> None:
    with Frontend.connect(place) as peer:
        peer.negotiate()
    before = num_fds(), threading.active_count()
    for _ in range(TIMES):
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(place)
    wait_for(lambda: num_fds() <= before[0] + 1 and threading.active_count() <= before[1] + 1)
    with Frontend.connect(place) as peer:
        peer.negotiate()


def test_regions_for_requests_in_flight_are_held_once_however_often_one_is_asked_for(place: str) -> None:
    with Frontend.connect(place) as peer:
        peer.negotiate()
        before = num_fds()
        for _ in range(TIMES):
            peer.ask(Req.GET_INFLIGHT_FD, Inflight(0, 0, 2, 32768))
            (fd,) = peer.fds
            peer.do(Req.SET_INFLIGHT_FD, Inflight(os.fstat(fd.fileno()).st_size, 0, 2, 32768), [fd.fileno()])
            fd.close()
        assert num_fds() <= before + 2


def test_a_descriptor_for_the_log_set_again_and_again_is_held_once(place: str, descriptor: Callable[[], int]) -> None:
    with Frontend.connect(place) as peer:
        peer.negotiate()
        note = descriptor()
        peer.tell(Req.SET_LOG_FD, fds=[note])
        before = num_fds()
        for _ in range(TIMES):
            peer.tell(Req.SET_LOG_FD, fds=[note])
        peer.barrier()
        assert num_fds() <= before + 1


def test_a_log_set_again_and_again_is_held_once(place: str) -> None:
    with Frontend.connect(place) as peer:
        peer.negotiate()
        log = os.memfd_create("log")
        try:
            os.ftruncate(log, 1 << 20)
            peer.ask(Req.SET_LOG_BASE, Log(1 << 20, 0), [log])
            before = num_fds()
            for _ in range(TIMES):
                peer.ask(Req.SET_LOG_BASE, Log(1 << 20, 0), [log])
            assert num_fds() <= before + 1
        finally:
            os.close(log)


def test_a_socket_is_never_open_to_others_while_it_is_made(tmp_path: Path) -> None:
    """Somebody watches the directory all the time, with a umask of ours that would let everybody in."""
    seen: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for entry in os.scandir(tmp_path):
                try:
                    seen.add(entry.stat(follow_symlinks=False).st_mode & 0o777)
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=watch)
    before = os.umask(0)
    watcher.start()
    try:
        for _ in range(TIMES):
            listener: Listener = listen(str(tmp_path / "disk.sock"))
            wait_for(lambda: bool(seen))  # the watcher's turn may be long in coming
            listener.close()
    finally:
        over.set()
        watcher.join()
        os.umask(before)
    assert seen <= {0o600}, {oct(mode) for mode in seen}
    assert seen, "the watcher saw nothing"
