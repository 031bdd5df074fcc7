"""Raw access: what no driver and no front-end would do is done to our own back-end, which survives it."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.frontend.conftest import WAIT_S, Serve
from tests.frontend.fakes import message, u64

from vhostuser.backend import Server
from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.errors import PeerGone
from vhostuser.frontend import (
    DescriptorKind,
    HostDevice,
    HostQueue,
    RawFrontend,
    RawRing,
    SharedMemory,
    raw_queue,
    ring_bytes,
)
from vhostuser.transport import Transport, listen

NEXT, WRITE, INDIRECT = 1, 2, 4


class Started:
    """A device of ours with a raw ring of 8 descriptors, one page of memory, and the connection shared."""

    def __init__(self, transport: Transport) -> None:
        self.device = HostDevice(transport, features=1 << 32 | 1 << 28)
        self.device.realize()
        self.memory = SharedMemory(ring_bytes(8), 4096)
        self.queue: HostQueue[RawRing] = raw_queue(self.memory, 0, 8)
        self.ring = self.queue.driver
        self.buffer = self.memory.allocate(4096)
        self.device.start(self.memory, [self.queue])
        self.raw = RawFrontend(self.device.dialogue.transport)

    def kick(self) -> None:
        self.queue.notify()

    def used(self) -> list[tuple[int, int]]:
        """What the back-end uses next."""
        assert select.select([self.queue.call], [], [], WAIT_S)[0], "nothing is used"
        self.queue.called()
        return self.ring.used()

    def broken(self) -> bool:
        """Wait until the back-end reports the ring as broken."""
        return bool(select.select([self.queue.err], [], [], WAIT_S)[0])

    def close(self) -> None:
        self.device.close()
        self.queue.close()


def header(kind: int, sector: int) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.fixture
def started(serve: Serve) -> Iterator[Started]:
    made = Started(serve(BlockDevice(MemoryDisk(1 << 20))))
    yield made
    made.close()
    vars(made).clear()  # pytest keeps it beyond the end


def test_a_chain_is_written_by_hand_and_served(started: Started) -> None:
    view, start = started.buffer.view, started.buffer.guest_addr
    view[:528] = header(1, 2) + b"w" * 512
    view[1024:1040] = header(0, 2)
    view[4000] = view[4001] = 0xFF
    ring = started.ring
    ring.descriptor(5, start, 528, NEXT, 2)
    ring.descriptor(2, start + 4000, 1, WRITE)
    ring.offer(5)
    started.kick()
    assert started.used() == [(5, 1)]
    ring.table(started.buffer.offset + 2048, [(start + 1024, 16, NEXT, 1), (start + 3000, 513, WRITE, 0)])
    ring.descriptor(0, start + 2048, 32, INDIRECT)
    ring.offer(0)
    started.kick()
    assert started.used() == [(0, 513)]
    assert bytes(view[3000:3513]) == b"w" * 512 + b"\0"
    assert (ring.avail_index, ring.used_index) == (2, 2)


@pytest.mark.parametrize("how", ["loop", "head", "index", "address", "table", "nested"])
def test_what_no_driver_would_do_breaks_the_ring_and_not_the_back_end(started: Started, how: str) -> None:
    ring, start = started.ring, started.buffer.guest_addr
    match how:
        case "loop":
            ring.descriptor(0, start, 16, NEXT, 1)
            ring.descriptor(1, start, 16, NEXT, 0)
            ring.offer(0)
        case "head":
            ring.offer(0x1234)
        case "index":
            ring.avail_index = 9
        case "address":
            ring.descriptor(0, start, 16, NEXT, 1)
            ring.descriptor(1, 1 << 62, 1, WRITE)
            ring.offer(0)
        case "table":
            ring.descriptor(0, start, 17, INDIRECT)
            ring.offer(0)
        case "nested":
            ring.table(started.buffer.offset, [(start, 16, INDIRECT, 0)])
            ring.descriptor(0, start, 16, INDIRECT)
            ring.offer(0)
    started.kick()
    if how == "address":
        assert started.used() == [(0, 0)], "it cannot be answered, and is given back"
    else:
        assert started.broken()
    assert started.device.dialogue.number(1), "the connection goes on"


def test_event_indices_and_flags_can_be_seen_and_set(started: Started) -> None:
    ring = started.ring
    ring.avail_flags, ring.used_event = 1, 0x1234
    assert (ring.avail_flags, ring.used_event) == (1, 0x1234)
    assert ring.used_flags in (0, 1)
    assert ring.avail_event == 0
    assert ring.used() == []


def test_any_header_and_payload_can_be_sent_and_answers_come_as_bytes(started: Started) -> None:
    raw = started.raw
    reply = raw.exchange(15)
    assert reply is not None
    assert (reply.request, reply.flags, reply.size) == (15, 5, 8)
    assert raw.exchange(777, b"what", flags=9) is not None
    assert raw.exchange(8, struct.pack("=II", 0, 3), flags=9, fds=()) is not None, "refused, with an answer"
    raw.send(1, size=4097)
    assert raw.closed_by_peer()
    assert raw.receive() is None


@pytest.mark.parametrize("kind", DescriptorKind)
@pytest.mark.parametrize("request_", [1, 12, 13, 14, 21, 37])
def test_a_descriptor_of_any_kind_is_answered_or_ends_the_connection(
    tmp_path: Path, kind: DescriptorKind, request_: int
) -> None:
    path = str(tmp_path / "raw.sock")
    with MemoryDisk(1 << 20) as disk:
        device = BlockDevice(disk)
        server = Server(device, listen(path))
        server.start()
        payload = {1: b"", 21: b"", 37: bytes(8) + struct.pack("=QQQQ", 0, 4096, 0, 0)}.get(request_, bytes(8))
        with RawFrontend(path, timeout_s=WAIT_S) as raw, kind.make() as fd:
            raw.exchange(1)
            raw.exchange(15)
            raw.send(16, struct.pack("=Q", 1 << 3 | 1 << 5 | 1 << 15))
            answer = raw.exchange(request_, payload, flags=9, fds=[fd])
            assert answer is None or answer.request == request_
        with HostDevice(path) as good:
            good.realize()
        server.stop()
        assert server.join(WAIT_S)
        device.close()
        del server, device


def test_half_a_message_is_told_from_a_whole_one_and_from_silence(tmp_path: Path) -> None:
    ours, theirs = Transport.pair()
    with RawFrontend(theirs, timeout_s=0.05) as raw, ours:
        ours.send(message(1, b"abc", size=8))
        with pytest.raises(PeerGone, match="sent 3 of 8 bytes within"):
            raw.receive()
        ours.send(u64(1, 5)[:4])
        ours.shutdown()
        with pytest.raises(PeerGone, match="ended after 4 bytes of a header"):
            raw.receive()
        assert raw.closed_by_peer()


def test_descriptors_that_come_are_the_caller_s() -> None:
    ours, theirs = Transport.pair()
    with RawFrontend(theirs) as raw, ours, DescriptorKind.PIPE_READ_END.make() as sent:
        ours.send(u64(31, 5), [sent, sent])
        got = raw.receive()
        assert got is not None
        assert len(got.fds) == 2
        assert os.fstat(got.fds[0].fileno()).st_ino == os.fstat(sent.fileno()).st_ino
        for fd in got.fds:
            fd.close()
