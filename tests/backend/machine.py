"""A session, a front-end that says anything to it, and a short model of both. Touches a socket, files, threads."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass, field
from struct import pack, unpack_from
from typing import Final

from hypothesis.stateful import RuleBasedStateMachine
from tests.backend.frontend import WAIT_S

from vhostuser.backend import Session
from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.protocol import F_PROTOCOL_FEATURES, FrontendRequest, ProtocolFeature, rule_of
from vhostuser.transport import Transport

Req = FrontendRequest

NUM_RINGS: Final = 2
FILE: Final = 0x40000
REGIONS: Final = {
    "low": (0x10_0000, 0x20000, 0x7000_0000, 0),
    "high": (0x20_0000, 0x20000, 0x7100_0000, 0x20000),
    "over low": (0x11_0000, 0x20000, 0x7200_0000, 0),
    "too long": (0x30_0000, FILE, 0x7300_0000, 0x1000),
    "empty": (0x40_0000, 0, 0x7400_0000, 0),
}
"""guest address, size, user address, offset in the file."""

GOOD: Final = {"low", "high", "over low"}
TOGETHER_BAD: Final = {"low", "over low"}
PLACES: Final = {"low": 0x7000_0000, "high": 0x7100_0000, "nowhere": 0x5000_0000, "odd": 0x7000_0008}
AVAIL: Final = 0x4000
USED: Final = 0x6000


@dataclass
class Ring:
    """What was told about one ring."""

    num: int | None = None
    place: str | None = None
    base: int = 0
    kicked: bool = False
    running: bool = False
    enabled: bool = False
    region: Region | None = None
    """What it keeps its requests in while it runs."""
    sound: bool = False
    """It runs, and nothing was wrong with it at its start or since."""


@dataclass
class Region:
    """An in-flight region that the back-end made: which of its parts were begun, for what size, and at which index."""

    fd: int
    num_queues: int
    queue_size: int
    begun: dict[int, tuple[int, int]] = field(default_factory=dict)


class Connected(RuleBasedStateMachine):
    """One disk, one front-end after the other: what is told, what comes back, and what the model makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = MemoryDisk(1 << 16)
        self.device = BlockDevice(self.disk, num_queues=NUM_RINGS, num_workers=1)
        self.file = os.memfd_create("machine", os.MFD_CLOEXEC)
        os.ftruncate(self.file, FILE)
        self.kick, self.call = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        self.null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.regions: list[Region] = []
        self.index = {(ring, place): 0 for ring in range(NUM_RINGS) for place in PLACES}
        self.connect()

    def connect(self) -> None:
        """Begin a connection; the model forgets all that belonged to the last one."""
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(WAIT_S)
        session = Session(self.device, Transport(theirs), drain_timeout_s=WAIT_S)
        self.thread = threading.Thread(target=session.run)
        self.thread.start()
        self.features = 0
        self.protocol = ProtocolFeature(0)
        self.status = 0
        self.memory: set[str] = set()
        self.rings = [Ring() for _ in range(NUM_RINGS)]
        self.enable_seen = False
        self.inflight: Region | None = None
        self.begin()

    def begin(self) -> None:
        """What every connection begins with."""

    def disconnect(self) -> None:
        """Hang up, and wait for the session's end."""
        self.socket.close()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive(), "the session does not end"

    def teardown(self) -> None:
        self.disconnect()
        assert not self.device.connected
        self.device.close()
        self.disk.close()
        for fd in (self.file, self.kick, self.call, self.null, *(region.fd for region in self.regions)):
            os.close(fd)

    # -- what is said and what comes back ------------------------------------------------------------------------------

    def say(self, request: int, payload: bytes, fds: tuple[int, ...], need_reply: bool) -> tuple[str, bytes]:
        """Send one message; returns what came of it: ("reply" or "silence" or "closed", the payload)."""
        header = pack("=III", request, 9 if need_reply else 1, len(payload))
        try:
            socket.send_fds(self.socket, [header + payload], fds)
            # Answered after whatever answers the message.
            self.socket.sendall(pack("=III", Req.GET_FEATURES, 1, 0))
            first, answer = self._read()
            if first == Req.GET_FEATURES and request != Req.GET_FEATURES:
                return "silence", b""
            assert first == request
            assert self._read()[0] == Req.GET_FEATURES, "it was answered twice"
        except (EOFError, ConnectionError):
            return "closed", b""
        return "reply", answer

    def _read(self) -> tuple[int, bytes]:
        header = self._exactly(12)
        request, flags, size = unpack_from("=III", header)
        assert flags == 5
        return request, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more, ancillary, _, _ = self.socket.recvmsg(size - len(data), socket.CMSG_SPACE(4))
            for _, _, found in ancillary:
                (self.received,) = memoryview(found).cast("i")
            if not more:
                raise EOFError
            data += more
        return data

    def check(
        self,
        request: Req,
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
        *,
        ack: bool,
        sense: bool,
        reply: bytes = b"",
    ) -> bool:
        """Say it, and hold what comes back against the table; True when it was carried out.

        ``sense`` is whether the model has nothing against it, ``reply`` what an own reply has to begin with.
        """
        line = rule_of(request).under(self.protocol)
        legal = line.lenient or (line.needs in self.protocol and not line.needs_acked & ~self.features)
        done = legal and sense
        if done and request is Req.SET_PROTOCOL_FEATURES:
            self.protocol = ProtocolFeature(unpack_from("=Q", payload)[0])
        outcome, answer = self.say(request, payload, fds, ack)
        told = (outcome, answer)
        if line.reply is not None:
            if done:
                assert (outcome, answer[: len(reply)]) == ("reply", reply)
            elif line.failure is None:
                assert told == ("closed", b"")
            else:
                assert told == ("reply", line.failure(1).pack())
        elif ack and ProtocolFeature.REPLY_ACK in self.protocol:
            assert outcome == "reply"
            assert (unpack_from("=Q", answer)[0] == 0) == done
        else:
            assert told == (("silence" if done else "closed"), b"")
        if outcome == "closed":
            self.disconnect()
            self.connect()
        return done

    # -- the model -----------------------------------------------------------------------------------------------------

    @staticmethod
    def fit(names: list[str]) -> bool:
        """Whether these regions make a table."""
        return set(names) <= GOOD and len(set(names)) == len(names) and not set(names) >= TOGETHER_BAD

    def remember(self, memory: set[str]) -> None:
        """The memory is this now: rings that waited for it start, rings that lie elsewhere are broken."""
        self.memory = memory
        for number, ring in enumerate(self.rings):
            if ring.running:
                ring.sound = ring.sound and self.lies_in_memory(ring.place)
            elif ring.kicked:
                self.start(number, ring)

    def lies_in_memory(self, place: str | None) -> bool:
        return place in self.memory

    def start(self, number: int, ring: Ring) -> bool:
        """Start a ring of which everything is known, or leave it; False when it cannot start."""
        if not ring.kicked or ring.num is None or ring.place is None or not self.memory:
            return True
        region = self.inflight
        if not self.lies_in_memory(ring.place):
            return False
        if region is not None and (number >= region.num_queues or ring.num > region.queue_size):
            return False
        ring.running = ring.sound = True
        if not self.features & F_PROTOCOL_FEATURES and not self.enable_seen:
            ring.enabled = True
        ring.region = region
        if region is not None:
            index = self.index[number, ring.place]
            size, left_at = region.begun.get(number, (ring.num, index))
            if size != ring.num or (index - left_at) % 65536 > size:
                ring.sound = False  # it is another ring's
            elif number in region.begun:
                ring.base = index  # the ring's own index, and nothing in flight
            if ring.sound:
                region.begun[number] = size, index
        ring.sound = ring.sound and ring.base == self.index[number, ring.place]
        return True

    def reset(self) -> None:
        self.rings = [Ring() for _ in range(NUM_RINGS)]
        self.inflight = None
        self.status = 0

    def used(self, at: int) -> int:
        return int(unpack_from("<H", os.pread(self.file, 2, at + USED + 2))[0])
