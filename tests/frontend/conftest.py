"""Devices behind socket pairs, for the tests of the host side. Whoever leaks a descriptor fails."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from vhostuser.backend import Device, Server
from vhostuser.fds import Fd
from vhostuser.transport import Transport

Serve = Callable[[Device], Transport]

WAIT_S = 10.0


def open_descriptors() -> set[str]:
    """What this process has open, less what cannot be told apart from the listing itself."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Descriptors that only the collector closes are errors, and so are those that nobody closes."""
    monkeypatch.setattr(Fd, "warn_when_forgotten", True)
    before = open_descriptors()
    yield
    phases: tuple[Literal["setup", "call"], ...] = ("setup", "call")
    for phase in phases:
        caplog.get_records(phase).clear()  # errors that were logged hold on to everything
    if open_descriptors() - before:
        gc.collect()
    left = open_descriptors() - before
    assert not left


@pytest.fixture
def serve(nothing_leaks: None) -> Iterator[Serve]:
    """Serve a device of our own on one end of a socket pair, and return the other. It is closed at the end."""
    servers: list[tuple[Server, Device]] = []

    def serve_one(device: Device) -> Transport:
        ours, theirs = socket.socketpair()
        server = Server(device, Transport(theirs))
        server.start()
        servers.append((server, device))
        return Transport(ours)

    yield serve_one
    for server, device in servers:
        server.stop()
        assert server.join(WAIT_S), "the server does not end"
        device.close()
    servers.clear()
