"""The other end of a session, for tests: the protocol in the front-end's role, and rings in shared memory.

Touches: one socket, and memory shared with the back-end.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from vhostuser._native import Arena, DriverRing
from vhostuser.fds import Fd
from vhostuser.protocol import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    Config,
    Connection,
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    Message,
    Nothing,
    Payload,
    ProtocolFeature,
    Reply,
    Role,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)
from vhostuser.transport import Transport

Req = FrontendRequest

WAIT_S: Final = 10.0
"""How long anything may take before a test gives up; longer on a busy machine than ever needed."""

USER_BASE: Final = 0x7F00_0000_0000
"""Where the tests pretend that the front-end has mapped guest address 0."""

INDIRECT_EVENT_V1: Final = 1 << 28 | 1 << 29 | 1 << 32


ACKED: Final = bytes(8)


class GoneError(Exception):
    """The back-end closed the connection."""


class Frontend:
    """One connection, as a hypervisor uses it."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes ``sock``."""
        self.transport = Transport(sock, send_timeout_s=WAIT_S)
        self.connection: Connection[Fd] = Connection(Role.FRONTEND)
        self.socket = sock
        self.fds: tuple[Fd, ...] = ()
        """What came with the last reply; the caller's to close."""

    @classmethod
    def connect(cls, path: str) -> Self:
        """Connect to a listening back-end."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def send(self, request: int, payload: Payload | None = None, fds: Sequence[int] = (), *, ack: bool = False) -> None:
        """Send a message and wait for nothing; ``fds`` stay the caller's."""
        own = tuple(Fd(os.dup(fd)) for fd in fds)
        self.transport.send(*self.connection.send(Message(request, payload or Nothing(), own, ack)))
        for fd in own:
            fd.close()

    def receive(self) -> Payload:
        """The payload of the next reply. Raises `GoneError` at the end of the stream."""
        while True:
            event = self.connection.next_event()
            if event is not None:
                assert isinstance(event, Reply)
                self.fds = event.fds
                return event.payload
            assert select.select([self.socket], [], [], WAIT_S)[0], "the back-end does not answer"
            try:
                data, fds = self.transport.receive(self.connection.want)
            except ConnectionResetError:
                raise GoneError from None
            if not data:
                raise GoneError
            self.connection.receive(data, fds)

    def ask(self, request: int, payload: Payload | None = None, fds: Sequence[int] = ()) -> Payload:
        """Send a message that has its own reply, and return that."""
        self.send(request, payload, fds)
        return self.receive()

    def number(self, request: int) -> int:
        """Ask for something that is answered by one integer."""
        answer = self.ask(request)
        assert isinstance(answer, U64)
        return answer.value

    def tell(self, request: int, payload: Payload | None = None, fds: Sequence[int] = ()) -> int:
        """Send a message that asks for an acknowledgement, and return its code: 0 for success."""
        self.send(request, payload, fds, ack=True)
        answer = self.receive()
        assert isinstance(answer, U64)
        return answer.value

    def do(self, request: int, payload: Payload | None = None, fds: Sequence[int] = ()) -> None:
        """`tell`, and it must succeed."""
        assert self.tell(request, payload, fds) == 0, f"{request!r} was refused"

    def tell_bluntly(self, request: int, payload: Payload) -> bytes:
        """The payload that answers a message which our own end would not let pass: `ACKED` is an acknowledgement."""
        data = payload.pack()
        self.socket.sendall(b"".join(word.to_bytes(4, sys.byteorder) for word in (request, 0x9, len(data))) + data)
        header = self._exactly(12)
        return self._exactly(int.from_bytes(header[8:], sys.byteorder))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            assert select.select([self.socket], [], [], WAIT_S)[0], "the back-end does not answer"
            more = self.socket.recv(size - len(data))
            if not more:
                raise GoneError
            data += more
        return data

    def barrier(self) -> None:
        """Return once everything sent before was carried out."""
        self.number(Req.GET_FEATURES)

    def negotiate(self, features: int | None = None, protocol: ProtocolFeature | None = None) -> int:
        """Begin as QEMU does, and accept ``features`` (all that is offered) and ``protocol`` features (likewise).

        Returns the virtio features accepted. Acknowledgements work afterwards.
        """
        offered = self.number(Req.GET_FEATURES)
        protocol_offered = ProtocolFeature(self.number(Req.GET_PROTOCOL_FEATURES))
        self.send(Req.SET_PROTOCOL_FEATURES, U64(protocol_offered if protocol is None else protocol))
        self.send(Req.SET_OWNER)
        chosen = (offered & ~F_LOG_ALL if features is None else features) & ~F_PROTOCOL_FEATURES
        self.send(Req.SET_FEATURES, U64(chosen | F_PROTOCOL_FEATURES))
        self.barrier()
        return chosen

    def config(self, size: int = 60, offset: int = 0, flags: int = 0) -> bytes:
        """GET_CONFIG."""
        answer = self.ask(Req.GET_CONFIG, Config(offset, size, flags, bytes(size)))
        assert isinstance(answer, Config)
        return answer.data

    def closed_by_peer(self) -> bool:
        """Wait until the back-end hangs up; False when it says something instead."""
        try:
            self.receive()
        except GoneError:
            return True
        return False

    def close(self) -> None:
        """Hang up."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GuestRing:
    """One ring of a guest in an arena of its own share of guest memory."""

    def __init__(self, memory: GuestRam, index: int, size: int, features: int) -> None:
        self.index = index
        self.size = size
        desc = memory.room(16 * size, 16)
        avail = memory.room(6 + 2 * size, 2)
        used = memory.room(6 + 8 * size, 4)
        self.places = (desc, avail, used)
        self.memory = memory
        self.features = features
        self.driver = DriverRing(
            memory.arena, size=size, desc=desc, avail=avail, used=used, features=features & ((1 << 64) - 1)
        )
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def addr(self) -> VringAddr:
        """The payload of SET_VRING_ADDR."""
        desc, avail, used = (USER_BASE + place for place in self.places)
        return VringAddr(self.index, 0, desc, used, avail, 0)

    def start(self, peer: Frontend, *, base: int = 0, enable: bool = True) -> None:
        """Set the ring up in the order of QEMU, and inject a kick as it does."""
        peer.do(Req.SET_VRING_NUM, VringState(self.index, self.size))
        peer.do(Req.SET_VRING_BASE, VringState(self.index, base))
        peer.do(Req.SET_VRING_ADDR, self.addr())
        peer.do(Req.SET_VRING_CALL, VringFd.of(self.index), [self.call])
        peer.do(Req.SET_VRING_ERR, VringFd.of(self.index), [self.err])
        peer.do(Req.SET_VRING_KICK, VringFd.of(self.index), [self.kick])
        os.eventfd_write(self.kick, 1)
        if enable:
            peer.do(Req.SET_VRING_ENABLE, VringState(self.index, 1))

    def stop(self, peer: Frontend) -> int:
        """GET_VRING_BASE."""
        answer = peer.ask(Req.GET_VRING_BASE, VringState(self.index, 0))
        assert isinstance(answer, VringState)
        return answer.num

    def submit(self, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> int:
        """Offer one chain and kick."""
        head = self.driver.add(readable, writable)
        if self.driver.publish():
            os.eventfd_write(self.kick, 1)
        return head

    def wait(self) -> list[tuple[int, int]]:
        """Wait for the back-end to give something back."""
        while True:
            done = self.driver.reap()
            if done:
                return done
            if self.driver.enable_calls():
                continue
            assert select.select([self.call], [], [], WAIT_S)[0], "the ring is not served"
            os.eventfd_read(self.call)

    def request(self, kind: int, sector: int, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
        """One virtio-blk request: (status, what was read)."""
        base = self.memory.scratch
        header = kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little")
        view = memoryview(self.memory.arena)
        view[base : base + 16] = header
        view[base + 16 : base + 16 + len(data)] = data
        reply = base + 16 + len(data)
        view[reply : reply + room + 1] = b"\xff" * (room + 1)
        self.submit([(base, 16 + len(data))], [(reply, room + 1)])
        self.wait()
        return view[reply + room], bytes(view[reply : reply + room])

    def close(self) -> None:
        """Close the three eventfds."""
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


class GuestRam:
    """A few megabytes of guest memory at guest address 0."""

    SCRATCH: Final = 1 << 20

    def __init__(self, size: int = 4 << 20) -> None:
        self.arena = Arena(size)
        self.size = size
        self._next = 4096

    @property
    def scratch(self) -> int:
        """Where tests put requests."""
        return self.SCRATCH

    def room(self, size: int, align: int) -> int:
        """A place for part of a ring."""
        place = (self._next + align - 1) // align * align
        self._next = place + size
        return place

    def region(self) -> MemoryRegion:
        """All of it."""
        return MemoryRegion(0, self.size, USER_BASE, 0)

    def share(self, peer: Frontend) -> None:
        """SET_MEM_TABLE."""
        peer.do(Req.SET_MEM_TABLE, MemoryTable((self.region(),)), [self.arena.fd])

    def add(self, peer: Frontend) -> None:
        """ADD_MEM_REG."""
        peer.do(Req.ADD_MEM_REG, SingleRegion(self.region()), [self.arena.fd])
