"""SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE: a state moves beside the session, and no peer holds it up."""

from __future__ import annotations

import os
import select
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tests.backend.conftest import Serve
from tests.backend.fakes import FakeDevice
from tests.backend.frontend import WAIT_S, Frontend, GuestRam, GuestRing

from vhostuser.backend.device_state import MAX_STATE
from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.errors import ConfigRefused
from vhostuser.fds import Fd
from vhostuser.protocol import (
    Config,
    DeviceStateParams,
    DeviceStateReply,
    Direction,
    FrontendRequest,
    Phase,
    ProtocolFeature,
)

Req = FrontendRequest
SAVE, LOAD = Direction.SAVE, Direction.LOAD
OURS = 0x100
"""Success, over the descriptor that came with the message."""
REFUSED = 0x101


class Stateful(FakeDevice):
    """A device with a state of any length, which takes any but an empty one."""

    has_state = True

    def __init__(self) -> None:
        super().__init__()
        self.state = b"state"
        self.loaded: list[bytes] = []

    def save_state(self) -> bytes:
        return self.state

    def load_state(self, state: bytes) -> None:
        if not state:
            raise ConfigRefused("it is empty")
        self.loaded.append(state)


@pytest.fixture
def device() -> Iterator[Stateful]:
    made = Stateful()
    yield made
    made.close()


@pytest.fixture
def peer(device: Stateful, serve: Serve) -> Frontend:
    made = serve(device)
    made.negotiate()
    return made


def begin(peer: Frontend, direction: Direction, fd: int) -> int:
    """SET_DEVICE_STATE_FD; the code that answers it."""
    reply = peer.ask(Req.SET_DEVICE_STATE_FD, DeviceStateParams(direction, Phase.STOPPED), [fd])
    assert isinstance(reply, DeviceStateReply)
    assert peer.fds == ()
    return reply.value


def check(peer: Frontend) -> int:
    return peer.number(Req.CHECK_DEVICE_STATE)


def pipe(stack: ExitStack, direction: Direction) -> tuple[Fd, Fd]:
    """Our end and the other one."""
    read, write = (stack.enter_context(Fd(number)) for number in os.pipe())
    return (read, write) if direction is SAVE else (write, read)


def pair(stack: ExitStack, direction: Direction) -> tuple[Fd, Fd]:
    ours, theirs = (stack.enter_context(Fd(one.detach())) for one in socket.socketpair())
    return ours, theirs


def file(stack: ExitStack, direction: Direction) -> tuple[Fd, Fd]:
    number, name = tempfile.mkstemp()
    stack.callback(os.unlink, name)
    return stack.enter_context(Fd(os.open(name, os.O_RDWR))), stack.enter_context(Fd(number))


Ways = Callable[[ExitStack, Direction], tuple[Fd, Fd]]


def read_all(fd: Fd) -> bytes:
    pieces = []
    while select.select([fd], [], [], WAIT_S)[0]:
        if not (piece := os.read(fd.fileno(), 1 << 16)):
            return b"".join(pieces)
        pieces.append(piece)
    raise AssertionError("the state has no end")


@pytest.mark.covers("VHOST_USER_SET_DEVICE_STATE_FD", "VHOST_USER_PROTOCOL_F_DEVICE_STATE")
@pytest.mark.parametrize("way", [pipe, pair])
@pytest.mark.parametrize("size", [0, 1, 5, 300_000])
def test_a_state_is_saved_through_whatever_the_front_end_gives(
    device: Stateful, peer: Frontend, way: Ways, size: int
) -> None:
    device.state = os.urandom(size)
    with ExitStack() as stack:
        ours, theirs = way(stack, SAVE)
        assert begin(peer, SAVE, theirs.fileno()) == OURS
        theirs.close()
        assert read_all(ours) == device.state
        assert check(peer) == 0


def test_a_state_is_saved_into_a_file(device: Stateful, peer: Frontend) -> None:
    with ExitStack() as stack:
        ours, theirs = file(stack, SAVE)
        assert begin(peer, SAVE, theirs.fileno()) == OURS
        assert check(peer) == 0
        assert os.read(ours.fileno(), 100) == b"state"


@pytest.mark.covers("VHOST_USER_CHECK_DEVICE_STATE")
@pytest.mark.parametrize("way", [pipe, pair, file])
@pytest.mark.parametrize("size", [1, 5, 50_000])
def test_a_state_is_loaded_when_it_is_asked_whether_it_was(
    device: Stateful, peer: Frontend, way: Ways, size: int
) -> None:
    state = os.urandom(size)
    with ExitStack() as stack:
        ours, theirs = way(stack, LOAD)
        if way is file:
            os.write(ours.fileno(), state)
        assert begin(peer, LOAD, theirs.fileno()) == OURS
        theirs.close()
        if way is not file:
            os.write(ours.fileno(), state)
        ours.close()
        assert check(peer) == 0
    assert device.loaded == [state]


def test_a_state_of_the_largest_size_is_taken_and_one_byte_more_is_not(device: Stateful, peer: Frontend) -> None:
    for size, code in ((MAX_STATE, 0), (MAX_STATE + 1, 1)):
        with tempfile.TemporaryFile() as whole:
            os.truncate(whole.fileno(), size)
            assert begin(peer, LOAD, whole.fileno()) == OURS
            assert check(peer) == code
    assert [len(state) for state in device.loaded] == [MAX_STATE]


def write_for_ever(fd: Fd) -> None:
    while True:
        os.write(fd.fileno(), bytes(1 << 16))


def test_an_endless_state_is_refused_without_reading_it_all(device: Stateful, peer: Frontend) -> None:
    with ExitStack() as stack:
        ours, theirs = pipe(stack, LOAD)
        assert begin(peer, LOAD, theirs.fileno()) == OURS
        theirs.close()
        with pytest.raises(BrokenPipeError):
            write_for_ever(ours)
        assert check(peer) == 1
    assert device.loaded == []


def test_what_the_device_does_not_take_is_said_when_it_is_asked(
    device: Stateful, peer: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        ours, theirs = pipe(stack, LOAD)
        assert begin(peer, LOAD, theirs.fileno()) == OURS
        theirs.close()
        ours.close()
        assert check(peer) == 1
    assert "CHECK_DEVICE_STATE is refused: it is empty" in caplog.text
    peer.barrier()


def test_a_running_ring_forbids_both_ways_and_a_stop_allows_them(device: Stateful, peer: Frontend) -> None:
    ram = GuestRam()
    ring = GuestRing(ram, 0, 16, 0)
    ram.share(peer)
    ring.start(peer)
    with ExitStack() as stack:
        for direction in Direction:
            _, theirs = pipe(stack, direction)
            assert begin(peer, direction, theirs.fileno()) == REFUSED
        ring.stop(peer)
        ours, theirs = pipe(stack, LOAD)
        assert begin(peer, LOAD, theirs.fileno()) == OURS
        theirs.close()
        os.write(ours.fileno(), b"late")
        ours.close()
        ring.start(peer)
        assert check(peer) == 1, "it has begun without the state"
    assert device.loaded == []
    ring.close()


def test_nothing_was_moved_is_a_failure_and_so_is_asking_twice(peer: Frontend) -> None:
    assert check(peer) == 1
    with tempfile.TemporaryFile() as whole:
        assert begin(peer, SAVE, whole.fileno()) == OURS
    assert check(peer) == 0
    assert check(peer) == 1


@pytest.mark.parametrize("kind", ["eventfd", "null"])
@pytest.mark.parametrize("direction", Direction)
def test_a_descriptor_that_carries_no_state_is_refused(peer: Frontend, kind: str, direction: Direction) -> None:
    number = os.eventfd(0) if kind == "eventfd" else os.open("/dev/null", os.O_RDWR)
    with Fd(number):
        assert begin(peer, direction, number) == REFUSED
    assert check(peer) == 1


@pytest.mark.parametrize("direction", Direction)
def test_the_wrong_end_of_a_pipe_is_a_failed_transfer(device: Stateful, peer: Frontend, direction: Direction) -> None:
    with ExitStack() as stack:
        wrong, right = pipe(stack, direction)
        assert begin(peer, direction, wrong.fileno()) == OURS
        right.close()
        wrong.close()
        assert check(peer) == 1
    assert device.loaded == []


def test_a_reader_that_leaves_early_is_a_failed_save_and_the_device_goes_on(device: Stateful, peer: Frontend) -> None:
    device.state = bytes(1 << 20)
    with ExitStack() as stack:
        ours, theirs = pipe(stack, SAVE)
        assert begin(peer, SAVE, theirs.fileno()) == OURS
        theirs.close()
        os.read(ours.fileno(), 10)
        ours.close()
        assert check(peer) == 1
    device.state = b"again"
    with tempfile.TemporaryFile() as whole:
        assert begin(peer, SAVE, whole.fileno()) == OURS
        assert check(peer) == 0


@pytest.mark.parametrize("direction", Direction)
def test_a_peer_that_moves_nothing_is_answered_and_told_after_a_while_that_it_failed(
    device: Stateful, peer: Frontend, direction: Direction
) -> None:
    device.state = bytes(1 << 20)
    with ExitStack() as stack:
        _, theirs = pipe(stack, direction)
        assert begin(peer, direction, theirs.fileno()) == OURS
        peer.barrier()
        peer.config(8)
        assert check(peer) == 1
        peer.barrier()


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "device state"]


@pytest.mark.parametrize("direction", Direction)
def test_a_peer_that_leaves_meanwhile_leaves_no_thread_and_no_descriptor(
    device: Stateful, serve: Serve, direction: Direction
) -> None:
    device.state = bytes(1 << 20)
    peer = serve(device)
    peer.negotiate()
    with ExitStack() as stack:
        ours, theirs = pipe(stack, direction)
        assert begin(peer, direction, theirs.fileno()) == OURS
        theirs.close()
        assert threads() == ["device state"]
        peer.close()
        # Their end is closed once nobody moves anything any more: what is in the pipe, and then the end of it.
        if direction is SAVE:
            assert len(read_all(ours)) < len(device.state)
        else:
            poll = select.poll()
            poll.register(ours.fileno(), 0)
            assert poll.poll(WAIT_S * 1000), "the other end is still open"


def test_another_transfer_ends_the_one_before(device: Stateful, peer: Frontend) -> None:
    device.state = bytes(1 << 20)
    with ExitStack() as stack:
        for _ in range(5):
            _, theirs = pipe(stack, SAVE)
            assert begin(peer, SAVE, theirs.fileno()) == OURS
            assert len(threads()) == 1
        with tempfile.TemporaryFile() as whole:
            assert begin(peer, SAVE, whole.fileno()) == OURS
            assert check(peer) == 0
            assert os.fstat(whole.fileno()).st_size == 1 << 20
    assert threads() == []


def test_a_device_without_a_state_offers_none(serve: Serve) -> None:
    plain = FakeDevice()
    peer = serve(plain)
    peer.negotiate()
    assert ProtocolFeature.DEVICE_STATE not in ProtocolFeature(peer.number(Req.GET_PROTOCOL_FEATURES))
    payload = DeviceStateParams(SAVE, Phase.STOPPED)
    assert peer.tell_bluntly(Req.SET_DEVICE_STATE_FD, payload) == DeviceStateReply(REFUSED).pack()
    plain.close()


@pytest.fixture
def disks() -> Iterator[list[BlockDevice]]:
    """Two like disks, closed when nobody serves them any more."""
    with ExitStack() as stack:
        made = [BlockDevice(stack.enter_context(MemoryDisk(1 << 20))) for _ in range(2)]
        for one in made:
            stack.callback(one.close)
        yield made


def test_a_disk_s_state_crosses_from_one_back_end_to_the_next(disks: list[BlockDevice], serve: Serve) -> None:
    source, destination = [serve(one) for one in disks]
    source.negotiate()
    destination.negotiate()
    with ExitStack() as stack:
        source.do(Req.SET_CONFIG, Config(32, 1, 0, b"\0"))
        ours, theirs = pair(stack, SAVE)
        assert begin(source, SAVE, theirs.fileno()) == OURS
        theirs.close()
        state = read_all(ours)
        assert check(source) == 0
        for damaged, code in ((state[:-1], 1), (state + b"\0", 1), (state, 0)):
            ours, theirs = pair(stack, LOAD)
            assert begin(destination, LOAD, theirs.fileno()) == OURS
            theirs.close()
            os.write(ours.fileno(), damaged)
            ours.close()
            assert check(destination) == code
            assert destination.config(1, 32) == bytes([code]), "on until a good state says off"
