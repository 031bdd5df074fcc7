"""Devices behind sockets, for the tests of the back-end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
from tests.backend.fakes import FakeDevice
from tests.backend.frontend import WAIT_S, Frontend

from vhostuser.backend import Device, Server
from vhostuser.fds import Fd
from vhostuser.transport import Transport

Serve = Callable[[Device], Frontend]


@pytest.fixture(autouse=True)
def _forgotten_descriptors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fd, "warn_when_forgotten", True)


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    """A device whose queues only take notes."""
    made = FakeDevice()
    yield made
    made.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve a device on one end of a socket pair, and return the other end."""
    servers: list[Server] = []
    peers: list[Frontend] = []

    def serve_one(device: Device) -> Frontend:
        ours, theirs = socket.socketpair()
        server = Server(device, Transport(theirs), drain_timeout_s=0.2)
        server.start()
        servers.append(server)
        peers.append(Frontend(ours))
        return peers[-1]

    yield serve_one
    for peer in peers:
        peer.close()
    for server in servers:
        server.stop()
        assert server.join(WAIT_S), "the server does not end"


@pytest.fixture
def peer(device: FakeDevice, serve: Serve) -> Frontend:
    """A front-end connected to `device`, which has negotiated nothing."""
    return serve(device)
