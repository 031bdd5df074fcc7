"""Back-ends that break the rules on the main socket: one clear error each, in time, and nothing is left behind."""

from __future__ import annotations

import os
import socket
import struct
import threading

import pytest
from tests.frontend import fakes
from tests.frontend.conftest import WAIT_S
from tests.frontend.fakes import Answer, FakeBackend, Hangup, message, u64

from vhostuser.errors import PeerGone, RemoteProtocolError
from vhostuser.frontend import HostDevice, SharedMemory, plain_queue, ring_bytes

CONFIG_60 = struct.pack("=III", 0, 60, 0)


def always(data: bytes | Hangup | None) -> Answer:
    return lambda backend, received: data


def live(device: HostDevice) -> None:
    """The whole life of a device."""
    memory = SharedMemory(ring_bytes(8), 0)
    queue = plain_queue(memory, 0, 8, features=0)
    try:
        device.realize()
        device.read_config(0, 60)
        device.start(memory, [queue])
        device.write_config(32, b"\0")
        device.reset()
    finally:
        device.close()
        queue.close()


@pytest.mark.parametrize(
    ("request_", "answer", "evidence"),
    [
        (1, u64(15, 0), "GET_PROTOCOL_FEATURES: a reply came while GET_FEATURES was to be answered"),
        (1, message(1, bytes(4)), "GET_FEATURES: U64 is 8 bytes, not 4"),
        (1, message(1, bytes(12)), "U64 is 8 bytes, not 12"),
        (1, message(1, bytes(8), 1), "its flags are 0x1 where a reply has 0x5"),
        (1, message(1, bytes(8), 0xD), "its flags are 0xd where a reply has 0x5"),
        (1, message(1, bytes(8), 6), "has version 2, not 1"),
        (1, message(1, bytes(8), 0x15), "unknown flags: 0x15"),
        (1, message(1, size=5000), "announces 5000 bytes, more than 4096"),
        (24, message(24, CONFIG_60 + bytes(48)), "GET_CONFIG: Config of size 60 does not fit in 60 bytes"),
        (24, message(24, struct.pack("=III", 0, 48, 0) + bytes(48)), "GET_CONFIG"),
        (24, message(24, struct.pack("=III", 4, 60, 0) + bytes(60)), "offset 0 was asked for, not 4"),
        (11, message(11, struct.pack("=II", 3, 0)), "GET_VRING_BASE of ring 0 was answered with"),
        (11, message(11, struct.pack("=II", 0, 1 << 16)), "GET_VRING_BASE of ring 0 was answered with"),
        (11, u64(11, 0) + b"more", None),
        (3, u64(3, 0) + u64(3, 0), "a reply came"),
        (8, message(8), "U64 is 8 bytes, not 0"),
    ],
)
def test_a_wrong_reply_ends_the_connection_with_evidence(request_: int, answer: bytes, evidence: str | None) -> None:
    with FakeBackend(answers={request_: always(answer)}) as backend:
        device = HostDevice(backend.give(), timeout_s=0.2)
        with pytest.raises((RemoteProtocolError, PeerGone), match=evidence):
            live(device)


WAITED_FOR = (1, 15, 17, 36, 21, 3, 39, 2, 40, 37, 8, 10, 9, 13, 14, 12, 18, 24, 25, 11, 34)
"""Every message of a life but SET_PROTOCOL_FEATURES, which is sent before acknowledgements are agreed on."""


@pytest.mark.parametrize("request_", WAITED_FOR)
@pytest.mark.parametrize("how", ["silent", "gone", "half"])
def test_silence_and_hang_ups_at_any_message_are_told_in_time(request_: int, how: str) -> None:
    answers = {"silent": None, "gone": Hangup(), "half": Hangup(message(request_, size=8) + b"abc")}
    with FakeBackend(protocol=fakes.ALL, answers={request_: always(answers[how])}) as backend:
        limit_s = 0.05 if how == "silent" else 10.0
        device = HostDevice(backend.give(), timeout_s=limit_s, drain_timeout_s=limit_s)
        expected = {
            "silent": r"did not answer \w+ within 0\.05 s",
            "gone": r"closed the connection",
            "half": "the stream ends in the middle of a message",
        }
        with pytest.raises((PeerGone, RemoteProtocolError), match=expected[how]):
            live(device)


def test_after_the_first_failure_every_call_tells_the_same_at_once() -> None:
    with FakeBackend(answers={24: always(u64(1, 0))}) as backend:
        device = HostDevice(backend.give())
        device.realize()
        with pytest.raises(RemoteProtocolError) as first:
            device.read_config(0, 8)
        with pytest.raises(RemoteProtocolError) as second:
            device.read_config(0, 8)
        assert str(first.value) == str(second.value)
        assert first.value is not second.value
        device.close()
        with pytest.raises(RemoteProtocolError):
            device.read_config(0, 8)


def test_descriptors_where_none_belong_are_closed_and_the_connection_ends() -> None:
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    device = HostDevice(ours.detach())
    answering = threading.Thread(
        target=lambda: (theirs.recv(100), socket.send_fds(theirs, [u64(1, 0)], [write_end, write_end]))
    )
    answering.start()
    with pytest.raises(RemoteProtocolError, match="GET_FEATURES: 2 descriptors came where 0 belong"):
        device.realize()
    answering.join(WAIT_S)
    os.close(write_end)
    assert os.read(read_end, 1) == b"", "nobody holds the other end any more"
    os.close(read_end)
    theirs.close()
    device.close()


def test_one_byte_at_a_time_is_slow_but_right() -> None:
    ours, theirs = socket.socketpair()
    device = HostDevice(ours.detach())

    def trickle() -> None:
        theirs.recv(100)
        for byte in u64(1, 1 << 32):
            theirs.send(bytes([byte]))

    answering = threading.Thread(target=trickle)
    answering.start()
    assert device.dialogue.number(1) == 1 << 32
    answering.join(WAIT_S)
    theirs.close()
    device.close()


def test_a_back_end_that_trickles_for_ever_meets_the_time_limit() -> None:
    ours, theirs = socket.socketpair()
    device = HostDevice(ours.detach(), timeout_s=0.1)
    theirs.send(u64(1, 0)[:12])
    with pytest.raises(PeerGone, match=r"did not answer GET_FEATURES within 0\.1 s"):
        device.realize()
    theirs.close()
    device.close()


def test_a_back_end_that_reads_nothing_meets_the_time_limit() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with FakeBackend(protocol=fakes.CONFIG) as good:
        polite = HostDevice(good.give())
        polite.realize()
        device = HostDevice(ours.detach(), timeout_s=0.1)

        def tell_for_ever() -> None:
            while True:
                device.dialogue.tell(3)

        with pytest.raises(PeerGone, match=r"did not read a message within 0\.1 s"):
            tell_for_ever()
        assert polite.read_config(20, 4) == struct.pack("<I", 512), "other devices go on"
        polite.close()
    theirs.close()
    device.close()


def test_threads_that_ask_at_once_all_get_their_own_answer() -> None:
    with FakeBackend() as backend:
        device = HostDevice(backend.give())
        device.realize()
        wrong: list[object] = []

        def ask(offset: int) -> None:
            for _ in range(50):
                if (got := device.read_config(offset, 4)) != bytes(backend.space[offset : offset + 4]):
                    wrong.append(got)

        threads = [threading.Thread(target=ask, args=(offset,)) for offset in (0, 12, 20, 36)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not wrong
        device.close()
