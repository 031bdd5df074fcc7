"""One front-end after another: refusing, waiting, listening again, ending, and leaving nothing behind."""

from __future__ import annotations

import os
import resource
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.backend.fakes import FakeDevice, addr_of
from tests.backend.frontend import WAIT_S, Frontend, GoneError, GuestRam

from vhostuser.backend import Server
from vhostuser.backend.server import raise_fd_limit
from vhostuser.protocol import FrontendRequest, VringFd, VringState
from vhostuser.transport import Listener, adopt, listen

Req = FrontendRequest


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "disk.sock")


@pytest.fixture
def server(device: FakeDevice, path: str) -> Iterator[Server]:
    """A server on `path` whose patience with storage is short."""
    with Server(device, listen(path), drain_timeout_s=0.2) as made:
        yield made


def run_ring(peer: Frontend) -> None:
    peer.negotiate()
    GuestRam(1 << 20).share(peer)
    peer.do(Req.SET_VRING_NUM, VringState(0, 64))
    peer.do(Req.SET_VRING_ADDR, addr_of(0))
    peer.do(Req.SET_VRING_KICK, VringFd.of(0, no_fd=True))


@pytest.mark.usefixtures("server")
def test_a_front_end_may_come_back_any_number_of_times(path: str) -> None:
    for _ in range(10):
        with Frontend.connect(path) as peer:
            run_ring(peer)


@pytest.mark.usefixtures("server")
def test_a_second_front_end_is_refused_at_once_with_a_log_line(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with Frontend.connect(path) as first, Frontend.connect(path) as second:
        first.negotiate()
        assert second.closed_by_peer()
        first.barrier()
    assert "a front-end was refused: another one is connected" in caplog.text


@pytest.mark.usefixtures("server")
def test_who_comes_while_storage_still_works_waits_and_is_served_then(device: FakeDevice, path: str) -> None:
    with Frontend.connect(path) as first:
        run_ring(first)
        device.fake.stuck = True
    with Frontend.connect(path) as second:
        second.send(Req.GET_FEATURES)
        assert not select.select([second.socket], [], [], 0.05)[0]
        device.fake.stuck = False
        second.receive()
    assert ("stop", 0) in device.fake.calls


@pytest.mark.usefixtures("server")
def test_who_waits_for_storage_waits_no_longer_than_the_limit(
    device: FakeDevice, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Frontend.connect(path) as first:
        run_ring(first)
        device.fake.stuck = True
    with Frontend.connect(path) as second:
        second.send(Req.GET_FEATURES)
        with pytest.raises(GoneError):
            second.receive()
    assert "storage has not come to rest" in caplog.text
    device.fake.stuck = False
    with Frontend.connect(path) as third:
        third.negotiate()


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x01\0\0\0\x02\0\0\0\0\0\0\0", id="another version"),
        pytest.param(b"\x01\0\0\0\x05\0\0\0\0\0\0\0", id="a reply"),
        pytest.param(b"\x02\0\0\0\x01\0\0\0\xff\xff\xff\xff", id="an endless payload"),
        pytest.param(b"\x01\0\0\0\x01\0", id="half a header, and gone"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="a web browser"),
    ],
)
def test_whatever_a_peer_sends_the_server_listens_again(
    path: str, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, suppress(ConnectionResetError):
        sock.connect(path)
        sock.send(garbage)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""
    with Frontend.connect(path) as peer:
        peer.negotiate()
    assert caplog.text.count("the connection ended") == 1


def test_a_bug_of_ours_costs_the_connection_and_not_the_server(
    device: FakeDevice, server: Server, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not server.connected
    monkeypatch.setattr(device, "read_config", None)
    with Frontend.connect(path) as peer:
        peer.negotiate()
        assert server.connected
        with pytest.raises(GoneError):
            peer.config(4)
    with Frontend.connect(path) as peer:
        peer.negotiate()


def test_stopping_completes_what_was_taken_and_removes_the_socket(device: FakeDevice, path: str) -> None:
    server = Server(device, listen(path))
    server.start()
    with Frontend.connect(path) as peer:
        run_ring(peer)
        server.stop()
        assert peer.closed_by_peer()
    assert server.join(WAIT_S)
    assert device.fake.calls[-2:] == [("stop", 0), ("set_memory", 0)]
    assert not os.path.exists(path)
    server.stop()


def test_stopping_gives_storage_up_that_does_not_answer(device: FakeDevice, path: str) -> None:
    server = Server(device, listen(path), drain_timeout_s=0.05)
    server.start()
    with Frontend.connect(path) as peer:
        run_ring(peer)
        device.fake.stuck = True
        server.stop()
        assert server.join(WAIT_S)
        assert peer.closed_by_peer()


def test_a_server_for_one_front_end_ends_with_it(device: FakeDevice, path: str) -> None:
    server = Server(device, listen(path), once=True)
    thread = threading.Thread(target=server.run)
    thread.start()
    with Frontend.connect(path) as peer:
        peer.negotiate()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_an_inherited_listening_socket_is_served(device: FakeDevice, path: str) -> None:
    inherited = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    inherited.bind(path)
    inherited.listen()
    endpoint = adopt(inherited.detach())
    assert isinstance(endpoint, Listener)
    with Server(device, endpoint):
        for _ in range(2):
            with Frontend.connect(path) as peer:
                peer.negotiate()
    assert os.path.exists(path), "whoever made the file removes it"


def test_an_inherited_connection_is_served_alone(device: FakeDevice) -> None:
    ours, theirs = socket.socketpair()
    server = Server(device, adopt(theirs.detach()))
    server.start()
    with Frontend(ours) as peer:
        peer.negotiate()
    assert server.join(WAIT_S)


def test_the_limit_of_open_files_is_raised_as_far_as_needed_and_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        raise_fd_limit(4)
        raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert min(hard, 1500) <= raised <= 4096
        resource.setrlimit(resource.RLIMIT_NOFILE, (8192, hard))
        raise_fd_limit(4)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 8192
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
