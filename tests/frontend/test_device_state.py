"""The state of a device, taken out of one back-end and put into another: over every form that peers know."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.frontend import fakes
from tests.frontend.fakes import FakeBackend, Received, WithFd

from vhostuser.errors import BackendRefused, BackendUnfit, PeerGone, RemoteProtocolError, SetupError
from vhostuser.frontend import MOVABLE, HostDevice

STATEFUL = fakes.ALL & ~fakes.BACKEND_REQ | fakes.DEVICE_STATE


@contextmanager
def realized(timeout_s: float = fakes.WAIT_S, **options: Any) -> Iterator[tuple[FakeBackend, HostDevice]]:
    with (
        FakeBackend(**{"protocol": STATEFUL} | options) as backend,
        HostDevice(backend.give(), protocol_features=MOVABLE, timeout_s=timeout_s) as device,
    ):
        device.realize()
        yield backend, device


@pytest.mark.parametrize("size", [0, 1, 5000, 3 << 20])
def test_a_state_of_any_size_crosses_the_pipe(size: int) -> None:
    state = os.urandom(size)
    with realized() as (backend, device):
        backend.state = state
        assert device.save_state() == state
        assert backend.payloads(fakes.SET_DEVICE_STATE_FD) == [struct.pack("=II", 0, 0)]
        assert backend.requests[-1] == fakes.CHECK_DEVICE_STATE
    with realized() as (backend, device):
        device.load_state(state)
        assert backend.payloads(fakes.SET_DEVICE_STATE_FD) == [struct.pack("=II", 1, 0)]
        assert backend.state == state


def own_descriptor(state: bytes, read: list[int]) -> fakes.Answer:
    """A back-end that answers with a descriptor of its own, which it would rather use."""

    def answer(_: FakeBackend, received: Received) -> WithFd:
        theirs, ours = os.pipe()
        if received.payload[0]:  # load
            read.append(theirs)
            theirs = ours
        else:
            os.write(ours, state)
            os.close(ours)
        return WithFd(fakes.u64(received.request, 0), theirs)

    return answer


def test_a_descriptor_of_the_back_ends_own_is_used_instead() -> None:
    read: list[int] = []
    with realized(answers={fakes.SET_DEVICE_STATE_FD: own_descriptor(b"its state", read)}) as (_, device):
        assert device.save_state() == b"its state"
        device.load_state(b"our state")
        assert os.read(read[0], 100) == b"our state"
        os.close(read[0])


def test_a_back_end_without_a_state_closes_at_once_and_says_that_it_succeeded() -> None:
    """As Cloud Hypervisor's vhost_user_block."""
    with realized(answers={fakes.SET_DEVICE_STATE_FD: lambda *_: fakes.u64(42, 0x100)}) as (_, device):
        assert device.save_state() == b""
        device.load_state(b"more than nothing")
        device.load_state(b"")


def test_failures_of_the_back_end_are_told() -> None:
    with realized(answers={fakes.SET_DEVICE_STATE_FD: lambda *_: fakes.u64(42, 0x105)}) as (_, device):
        with pytest.raises(BackendRefused, match="SET_DEVICE_STATE_FD"):
            device.save_state()
        with pytest.raises(BackendRefused, match="SET_DEVICE_STATE_FD"):
            device.load_state(b"state")
    with realized(answers={fakes.CHECK_DEVICE_STATE: lambda *_: fakes.u64(43, 1)}) as (_, device):
        with pytest.raises(BackendRefused, match="CHECK_DEVICE_STATE"):
            device.save_state()
        with pytest.raises(BackendRefused, match="CHECK_DEVICE_STATE"):
            device.load_state(b"state")
    with (
        realized(answers={fakes.SET_DEVICE_STATE_FD: lambda *_: fakes.u64(42, 0)}) as (_, device),
        pytest.raises(RemoteProtocolError),
    ):
        device.save_state()


def test_a_back_end_that_moves_nothing_is_given_up() -> None:
    kept: list[int] = []

    def hold(backend: FakeBackend, received: Received) -> WithFd:
        ours, theirs = os.pipe()
        kept.append(theirs)
        return WithFd(fakes.u64(received.request, 0), ours)

    with realized(timeout_s=0.1, answers={fakes.SET_DEVICE_STATE_FD: hold}) as (_, device):
        with pytest.raises(PeerGone, match="did not move its state"):
            device.save_state()
        with pytest.raises(PeerGone):
            device.load_state(b"")
    os.close(kept[0])


def test_a_back_end_that_offers_no_state_is_unfit_for_it_and_one_that_runs_is_not_asked() -> None:
    with realized(protocol=fakes.ALL & ~fakes.BACKEND_REQ) as (_, device), pytest.raises(BackendUnfit, match="offer"):
        device.save_state()
    with (
        FakeBackend(protocol=STATEFUL) as backend,
        HostDevice(backend.give(), protocol_features=MOVABLE) as device,
        pytest.raises(SetupError, match="is connected, not realized"),
    ):
        device.save_state()
