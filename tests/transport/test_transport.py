"""Bytes and descriptors between two real sockets."""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from vhostuser.errors import LocalProtocolError, PeerGone, RemoteProtocolError, SetupError
from vhostuser.fds import Fd
from vhostuser.transport import Transport


@pytest.fixture
def pair() -> Iterator[tuple[Transport, Transport]]:
    left, right = (Transport(sock, send_timeout_s=0.05) for sock in socket.socketpair())
    with left, right:
        yield left, right


def memfd(text: bytes) -> Fd:
    fd = Fd(os.memfd_create("test"))
    os.write(fd.fileno(), text)
    return fd


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def receive_all(transport: Transport, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece, fds = transport.receive(size - len(data))
        assert piece
        assert not fds
        data += piece
    return data


def test_bytes_and_descriptors_arrive_together(pair: tuple[Transport, Transport]) -> None:
    left, right = pair
    with memfd(b"one") as one, memfd(b"two") as two:
        left.send(b"header and payload", (one, two))
        assert not one.closed
    data, fds = right.receive(6)
    assert data == b"header"
    assert [os.pread(fd.fileno(), 8, 0) for fd in fds] == [b"one", b"two"]
    assert not any(os.get_inheritable(fd.fileno()) for fd in fds)
    for fd in fds:
        fd.close()
    assert right.receive(100) == (b" and payload", [])


def test_a_read_never_joins_descriptors_with_an_earlier_message(pair: tuple[Transport, Transport]) -> None:
    left, right = pair
    left.send(b"first")
    with memfd(b"x") as fd:
        left.send(b"second", (fd,))
    assert right.receive(5) == (b"first", [])
    data, fds = right.receive(6)
    assert (data, len(fds)) == (b"second", 1)
    fds[0].close()


def test_the_peer_s_end_of_the_stream_is_no_bytes(pair: tuple[Transport, Transport]) -> None:
    left, right = pair
    left.close()
    left.close()
    assert left.fileno() == -1
    assert right.receive(12) == (b"", [])


def test_a_peer_that_leaves_our_bytes_unread_ends_the_stream(pair: tuple[Transport, Transport]) -> None:
    left, right = pair
    right.send(b"unread")
    left.close()
    assert right.receive(12) == (b"", [])


def test_sending_to_a_closed_end_says_that_the_peer_is_gone(pair: tuple[Transport, Transport]) -> None:
    left, right = pair
    right.close()
    with pytest.raises(PeerGone, match="closed"):
        left.send(b"x")
    with pytest.raises(PeerGone, match="closed"):
        left.send_some(b"x")


def test_a_peer_that_does_not_read_is_gone_after_the_time_limit(pair: tuple[Transport, Transport]) -> None:
    left, _ = pair
    with pytest.raises(PeerGone, match=r"did not read a message within 0\.05 s"):
        left.send(bytes(16 << 20))


def test_a_message_larger_than_the_socket_s_buffer_arrives_whole() -> None:
    left, right = (Transport(sock) for sock in socket.socketpair())
    with left, right:
        payload = bytes(range(256)) * 8192
        sender = threading.Thread(target=left.send, args=(payload,))
        sender.start()
        assert receive_all(right, len(payload)) == payload
        sender.join()


def test_descriptors_of_a_message_sent_in_pieces_arrive_once() -> None:
    left, right = (Transport(sock) for sock in socket.socketpair())
    with left, right, memfd(b"x") as fd:
        sender = threading.Thread(target=left.send, args=(bytes(4 << 20), (fd,)))
        sender.start()
        size, received = 0, []
        while size < 4 << 20:
            data, fds = right.receive(1 << 16)
            size += len(data)
            received += fds
        sender.join()
        assert len(received) == 1
        received[0].close()


def test_shutdown_wakes_a_thread_that_receives(pair: tuple[Transport, Transport]) -> None:
    left, right = pair
    found: list[tuple[bytes, list[Fd]]] = []
    reader = threading.Thread(target=lambda: found.append(right.receive(12)))
    reader.start()
    right.shutdown()
    reader.join()
    assert found == [(b"", [])]
    assert left.receive(12) == (b"", [])
    right.shutdown()
    right.close()
    right.shutdown()


def test_receiving_without_waiting_raises_when_there_is_nothing(pair: tuple[Transport, Transport]) -> None:
    left, right = pair
    with pytest.raises(BlockingIOError):
        right.receive(12, wait=False)
    left.send(b"x")
    assert right.receive(12, wait=False) == (b"x", [])


def test_a_socket_that_somebody_made_non_blocking_is_waited_for() -> None:
    left, right = socket.socketpair()
    right.setblocking(False)
    with Transport(left) as sender, Transport(right) as receiver:
        late = threading.Timer(0, sender.send, (b"late",))
        late.start()
        assert receiver.receive(12) == (b"late", [])
        late.join()
        assert fcntl.fcntl(receiver.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK


def test_thirty_two_descriptors_arrive(pair: tuple[Transport, Transport]) -> None:
    left, right = pair
    with memfd(b"x") as fd:
        left.send(b"m", [fd] * 32)
    data, fds = right.receive(1)
    assert (data, len(fds)) == (b"m", 32)
    for received in fds:
        received.close()


@pytest.mark.parametrize("count", [64, 253])
def test_more_descriptors_than_there_is_room_for_are_an_error_and_leak_nothing(count: int) -> None:
    left, right = socket.socketpair()
    before = count_fds()
    with left, Transport(right) as receiver:
        with memfd(b"x") as fd:
            numbers = array.array("i", [fd.fileno()] * count)
            left.sendmsg([b"m"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        with pytest.raises(RemoteProtocolError, match="cut off"):
            receiver.receive(1)
        assert count_fds() == before


def test_a_pipe_sends_and_nothing_else() -> None:
    read, write = os.pipe()
    with Fd(read), Transport.over(Fd(write), send_timeout_s=0.05) as transport:
        assert not transport.receives
        assert transport.fileno() == write
        transport.send(b"message")
        assert os.read(read, 100) == b"message"
        with pytest.raises(LocalProtocolError, match="write end"):
            transport.receive(12)
        with memfd(b"x") as fd, pytest.raises(LocalProtocolError, match="descriptor"):
            transport.send(b"m", (fd,))
        with pytest.raises(PeerGone, match="did not read"):
            transport.send(bytes(1 << 20))
        transport.shutdown()
        assert transport.fileno() == -1


def fill(transport: Transport) -> None:
    while transport.send_some(bytes(4096)):
        continue


def test_a_blocking_pipe_that_is_full_does_not_block() -> None:
    read, write = os.pipe()
    with Fd(read), Transport.over(Fd(write)) as transport:
        with pytest.raises(BlockingIOError):
            fill(transport)
        assert select.select([read], [], [], 0)[0]


def test_a_pipe_nobody_reads_any_more_is_a_peer_that_is_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    with Transport.over(Fd(write)) as transport, pytest.raises(PeerGone, match="closed"):
        transport.send(b"x")


def test_the_channel_may_be_a_socket_and_nothing_but_that_or_a_pipe() -> None:
    left, right = socket.socketpair()
    with right, Transport.over(Fd(left.detach())) as transport:
        assert transport.receives
        transport.send(b"x")
        assert right.recv(12) == b"x"
    with memfd(b"x") as fd:
        with pytest.raises(SetupError, match="neither a socket nor a pipe"):
            Transport.over(fd)
        assert not fd.closed
