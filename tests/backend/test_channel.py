"""News of a changed configuration: when they are sent, when they wait, and that they never hold up the session."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest
from tests.backend.fakes import FakeDevice, addr_of
from tests.backend.frontend import ACKED, WAIT_S, Frontend, GuestRam

from vhostuser.backend import ConfigNotice
from vhostuser.fds import Fd
from vhostuser.protocol import (
    BackendRequest,
    Connection,
    FrontendRequest,
    Message,
    ProtocolFeature,
    Role,
    VringFd,
    VringState,
)

Req = FrontendRequest
CONFIG_CHANGE = b"\x02\0\0\0\x01\0\0\0\0\0\0\0"


@pytest.fixture
def channel(peer: Frontend) -> Iterator[socket.socket]:
    """Our end of the back-end channel of a front-end that has negotiated everything and shared memory."""
    peer.negotiate()
    GuestRam(1 << 20).share(peer)
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
    peer.do(Req.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
    theirs.close()
    yield ours
    ours.close()


def run_ring(peer: Frontend, index: int = 0) -> None:
    peer.do(Req.SET_VRING_NUM, VringState(index, 64))
    peer.do(Req.SET_VRING_ADDR, addr_of(index))
    peer.do(Req.SET_VRING_KICK, VringFd.of(index, no_fd=True))
    peer.do(Req.SET_VRING_ENABLE, VringState(index, 1))


def arrived(channel: socket.socket) -> bytes:
    """What is there without waiting."""
    return channel.recv(4096) if select.select([channel], [], [], 0)[0] else b""


def awaited(channel: socket.socket) -> bytes:
    assert select.select([channel], [], [], WAIT_S)[0], "nothing comes over the channel"
    return channel.recv(4096)


@pytest.mark.covers(
    "VHOST_USER_SET_BACKEND_REQ_FD",
    "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG",
    "VHOST_USER_PROTOCOL_F_BACKEND_REQ",
    "VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD",
)
def test_a_change_while_a_ring_runs_is_sent_without_asking_for_an_ack(
    device: FakeDevice, peer: Frontend, channel: socket.socket
) -> None:
    peer.config(16)
    run_ring(peer)
    assert arrived(channel) == b""
    assert device.config_changed() is ConfigNotice.SENT
    data = awaited(channel)
    assert data == CONFIG_CHANGE
    other: Connection[Fd] = Connection(Role.FRONTEND, nested=True)
    other.receive(data)
    assert other.next_event() == Message(BackendRequest.CONFIG_CHANGE_MSG)


def test_a_change_while_all_rings_are_stopped_is_sent_when_the_first_one_runs(
    device: FakeDevice, peer: Frontend, channel: socket.socket
) -> None:
    peer.config(16)
    assert device.config_changed() is ConfigNotice.DEFERRED
    peer.barrier()
    assert arrived(channel) == b""
    run_ring(peer)
    assert awaited(channel) == CONFIG_CHANGE
    run_ring(peer, 1)
    peer.barrier()
    assert arrived(channel) == b""


def test_a_change_that_was_read_meanwhile_is_not_sent(
    device: FakeDevice, peer: Frontend, channel: socket.socket
) -> None:
    peer.config(16)
    device.config_changed()
    peer.config(16)
    run_ring(peer)
    peer.barrier()
    assert arrived(channel) == b""


def test_a_front_end_that_never_read_the_configuration_is_told_when_its_first_ring_runs(
    peer: Frontend, channel: socket.socket
) -> None:
    run_ring(peer)
    assert awaited(channel) == CONFIG_CHANGE


def test_a_disabled_ring_does_not_count_as_running(device: FakeDevice, peer: Frontend, channel: socket.socket) -> None:
    peer.config(16)
    run_ring(peer)
    peer.do(Req.SET_VRING_ENABLE, VringState(0, 0))
    assert device.config_changed() is ConfigNotice.DEFERRED
    peer.barrier()
    assert arrived(channel) == b""


def test_without_a_channel_the_operator_is_told_so(device: FakeDevice, peer: Frontend) -> None:
    assert device.config_changed() in (ConfigNotice.NOT_CONNECTED, ConfigNotice.NO_CHANNEL)
    peer.negotiate()
    assert device.config_changed() is ConfigNotice.NO_CHANNEL


def test_without_a_connection_the_operator_is_told_so(device: FakeDevice) -> None:
    assert device.config_changed() is ConfigNotice.NOT_CONNECTED


def test_a_peer_that_reads_nothing_holds_nothing_up_and_gets_every_message_whole(
    device: FakeDevice, peer: Frontend, channel: socket.socket
) -> None:
    peer.config(16)
    run_ring(peer)
    sent = 200  # many more than fit
    for _ in range(sent):
        device.config_changed()
        peer.barrier()
    got = awaited(channel)
    assert len(got) < sent * len(CONFIG_CHANGE), "all of it fitted, and nothing was tried"
    while len(more := awaited(channel)):
        got += more
        peer.barrier()
        if not select.select([channel], [], [], 0)[0]:
            break
    assert got == CONFIG_CHANGE * (len(got) // len(CONFIG_CHANGE))
    device.config_changed()
    assert awaited(channel) == CONFIG_CHANGE


def test_a_closed_channel_is_forgotten_and_another_one_works(
    device: FakeDevice, peer: Frontend, channel: socket.socket
) -> None:
    peer.config(16)
    run_ring(peer)
    channel.close()
    peer.barrier()
    device.config_changed()
    peer.barrier()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer.do(Req.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        device.config_changed()
        # Twice when the session had seen the hang-up before the first change, which nobody was told of then.
        assert awaited(ours) in (CONFIG_CHANGE, 2 * CONFIG_CHANGE)


def test_a_new_channel_replaces_the_old_one(device: FakeDevice, peer: Frontend, channel: socket.socket) -> None:
    peer.config(16)
    run_ring(peer)
    ours, theirs = socket.socketpair()
    with ours:
        peer.do(Req.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        theirs.close()
        assert awaited(channel) == b"", "the old one is closed"
        device.config_changed()
        assert awaited(ours) == CONFIG_CHANGE


def test_a_peer_that_talks_out_of_turn_loses_the_channel_and_not_the_connection(
    peer: Frontend, channel: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    channel.send(b"\x02\0\0\0\x05\0\0\0\x08\0\0\0" + bytes(8))
    assert awaited(channel) == b""
    peer.barrier()
    assert "no more news reach the guest" in caplog.text


def test_the_channel_may_be_a_pipe(device: FakeDevice, peer: Frontend) -> None:
    peer.negotiate()
    GuestRam(1 << 20).share(peer)
    reader, writer = os.pipe()
    peer.do(Req.SET_BACKEND_REQ_FD, fds=[writer])
    os.close(writer)
    run_ring(peer)
    assert os.read(reader, 4096) == CONFIG_CHANGE
    while not pipe_is_full(reader):
        device.config_changed()
        peer.barrier()
    device.config_changed()
    peer.barrier()
    got = os.read(reader, 1 << 20)
    assert got == CONFIG_CHANGE * (len(got) // len(CONFIG_CHANGE))
    os.close(reader)
    device.config_changed()
    peer.barrier()


def pipe_is_full(reader: int) -> bool:
    """Whether the pipe behind `reader` takes nothing more."""
    with Fd(os.open(f"/proc/self/fd/{reader}", os.O_WRONLY | os.O_NONBLOCK)) as writer:
        return not select.select([], [writer], [], 0)[1]


def test_the_channel_needs_its_feature(peer: Frontend) -> None:
    peer.negotiate(protocol=ProtocolFeature.REPLY_ACK)
    assert peer.tell_bluntly(Req.SET_BACKEND_REQ_FD, VringState(0, 0)) != ACKED


def test_a_front_end_that_did_not_negotiate_config_is_told_nothing(device: FakeDevice, peer: Frontend) -> None:
    """QEMU opens a channel for every device type, and knows the configuration of few."""
    peer.negotiate(protocol=ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ)
    GuestRam(1 << 20).share(peer)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer.do(Req.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        run_ring(peer)
        assert device.config_changed() is ConfigNotice.NO_CHANNEL
        peer.barrier()
        assert arrived(ours) == b""
