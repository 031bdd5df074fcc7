"""A back-end made of bytes, for tests of the host side: polite by default, and as bad as a test wants it.

It knows nothing of our protocol package: numbers and layouts are written down here from the specification.
Touches: one socket, the memory and descriptors that come over it, one thread.
"""

from __future__ import annotations

import array
import mmap
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

WAIT_S: Final = 10.0

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
SET_BACKEND_REQ_FD, IOTLB_MSG, GET_CONFIG, SET_CONFIG = 21, 22, 24, 25
GET_INFLIGHT_FD, SET_INFLIGHT_FD = 31, 32
SET_LOG_BASE, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE = 6, 42, 43
RESET_DEVICE, GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG, SET_STATUS, GET_STATUS = 34, 36, 37, 38, 39, 40

MQ, REPLY_ACK, BACKEND_REQ, CONFIG, RESET, MEM_SLOTS, STATUS = 1, 1 << 3, 1 << 5, 1 << 9, 1 << 13, 1 << 15, 1 << 16
INFLIGHT, LOG_SHMFD, DEVICE_STATE, BASE_INFLIGHT = 1 << 12, 1 << 1, 1 << 19, 1 << 20
ALL: Final = MQ | REPLY_ACK | BACKEND_REQ | CONFIG | RESET | MEM_SLOTS | STATUS

SIZE_MAX, SEG_MAX, RO, BLK_SIZE, FLUSH, WCE = 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 11
DISCARD, WRITE_ZEROES, INDIRECT, EVENT_IDX, VERSION_1 = 1 << 13, 1 << 14, 1 << 28, 1 << 29, 1 << 32
ACCESS_PLATFORM, PROTOCOL, LOG_ALL = 1 << 33, 1 << 30, 1 << 26

IN, OUT = 0, 1


@dataclass
class Received:
    """One message as it came."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def number(self) -> int:
        """The payload as one integer."""
        return int.from_bytes(self.payload[:8], "little")


@dataclass
class Hangup:
    """An answer: close the connection, after sending some bytes."""

    first: bytes = b""


@dataclass
class WithFd:
    """An answer that comes with a descriptor, which is closed once it is sent."""

    data: bytes
    fd: int


Answer = Callable[["FakeBackend", Received], "bytes | Hangup | WithFd | None"]


def message(request: int, payload: bytes = b"", flags: int = 5, size: int | None = None) -> bytes:
    """A reply, or with other flags anything."""
    return struct.pack("=III", request, flags, len(payload) if size is None else size) + payload


def u64(request: int, value: int) -> bytes:
    """A reply of one integer."""
    return message(request, struct.pack("=Q", value))


def config(
    sectors: int = 2048, *, size_max: int = 0, seg_max: int = 126, blk_size: int = 512, writeback: int = 0
) -> bytearray:
    """A configuration space of 60 bytes: discards of 64 sectors in 2 ranges, zeroes of 128 in 1."""
    space = bytearray(60)
    struct.pack_into("<QII", space, 0, sectors, size_max, seg_max)
    struct.pack_into("<I", space, 20, blk_size)
    space[32] = writeback
    struct.pack_into("<HIIIII", space, 34, 1, 64, 2, 8, 128, 1)
    return space


class Ring:
    """One ring as the device sees it, in the front-end's memory."""

    def __init__(self) -> None:
        self.size = 0
        self.desc = self.avail = self.used = 0
        self.base = 0
        self.log: int | None = None  # guest address of the used ring, where it is logged
        self.kick = self.call = self.err = -1
        self.enabled = False


class FakeBackend:
    """One connection, served by a thread. ``answers`` replaces what is said to a request, ``device`` what a kick does.

    A `Hangup` closes the connection; None says nothing at all. ``log`` is what came, in order. With ``path`` it listens
    there for one connection, else it is one end of a socket pair.
    """

    def __init__(
        self,
        *,
        features: int = SEG_MAX | BLK_SIZE | FLUSH | VERSION_1 | PROTOCOL,
        protocol: int = ALL & ~BACKEND_REQ,
        space: bytes | None = None,
        queues: int = 1,
        slots: int = 8,
        answers: dict[int, Answer] | None = None,
        device: Callable[[FakeBackend, Ring], None] | None = None,
        path: str | None = None,
    ) -> None:
        self._listener: socket.socket | None = None
        self.theirs, self._socket = socket.socketpair()
        if path is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._listener.bind(path)
            self._listener.listen(1)
        self.features, self.protocol, self.queues, self.slots = features, protocol, queues, slots
        self.space = bytearray(config() if space is None else space)
        self.answers = answers or {}
        self.device = device or serve_disk
        self.disk = bytearray(2048 * 512)
        self._mover = threading.Thread()
        self.chains: list[list[tuple[int, int, bool]]] = []  # of every request: (address, length, writable)
        self.log: list[Received] = []
        self.acked = 0
        self.acked_protocol = 0
        self.status = 0
        self.memory: list[tuple[int, int, int, mmap.mmap]] = []  # guest address, user address, size
        self.rings: dict[int, Ring] = {}
        self.channel: socket.socket | None = None
        self.region: mmap.mmap | None = None
        self.dirty: mmap.mmap | None = None
        self.state = b""  # of the device: what is saved, or was loaded
        self.region_file: tuple[int, int] | None = None  # device and inode
        self.failure: BaseException | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._tasks: list[Callable[[], None]] = []
        self._open = True
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="fake back-end")

    @property
    def requests(self) -> list[int]:
        """The numbers of the messages that came."""
        return [received.request for received in self.log]

    def payloads(self, request: int) -> list[bytes]:
        """The payloads of the messages of one kind."""
        return [received.payload for received in self.log if received.request == request]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run_there(self._end)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        os.close(self._wake)
        self.memory.clear()
        self.region = self.dirty = None
        if self.theirs.fileno() >= 0:
            self.theirs.close()
        if error is None and self.failure is not None:
            raise self.failure

    def give(self) -> int:
        """The other end of the connection, to be taken over."""
        return self.theirs.detach()

    def run_there(self, task: Callable[[], None]) -> None:
        """Run ``task`` on the thread of the back-end, some time soon."""
        self._tasks.append(task)
        os.eventfd_write(self._wake, 1)

    def hang_up(self) -> None:
        """Close the connection, from any thread."""
        self.run_there(self._end)

    def _end(self) -> None:
        self._open = False

    def _run(self) -> None:
        try:
            if self._listener is None:
                self._selector.register(self._socket, selectors.EVENT_READ, self._receive)
            else:
                self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._selector.register(self._wake, selectors.EVENT_READ, self._do_tasks)
            while self._open:
                for key, _ in self._selector.select():
                    if self._open:
                        key.data()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the front-end has left, as it may at any time
        except BaseException as error:  # told by __exit__
            self.failure = error
        finally:
            self._close()

    def _accept(self) -> None:
        assert self._listener is not None
        self._socket.close()
        self._socket, _ = self._listener.accept()
        self._selector.unregister(self._listener)
        self._listener.close()
        self._selector.register(self._socket, selectors.EVENT_READ, self._receive)

    def _close(self) -> None:
        self._selector.close()
        if self._listener is not None:
            self._listener.close()
        self._socket.close()
        if self.channel is not None:
            self.channel.close()
        for ring in self.rings.values():
            for fd in (ring.kick, ring.call, ring.err):
                if fd >= 0:
                    os.close(fd)

    def _do_tasks(self) -> None:
        os.eventfd_read(self._wake)
        while self._tasks:
            self._tasks.pop(0)()

    def _receive(self) -> None:
        header, fds = self._exactly(12)
        if not header:
            self._open = False
            return
        request, flags, size = struct.unpack("=III", header)
        payload, _ = self._exactly(size)
        received = Received(request, flags, payload, fds)
        self.log.append(received)
        answer = self._answer(received)
        if isinstance(answer, Hangup):
            self._socket.sendall(answer.first)
            self._open = False
        elif isinstance(answer, WithFd):
            socket.send_fds(self._socket, [answer.data], [answer.fd])
            os.close(answer.fd)
        elif answer is not None:
            self._socket.sendall(answer)

    def _exactly(self, count: int) -> tuple[bytes, list[int]]:
        data, fds = b"", array.array("i")
        while len(data) < count:
            more, ancillary, _, _ = self._socket.recvmsg(count - len(data), 1024, socket.MSG_CMSG_CLOEXEC)
            if not more:
                return b"", []
            data += more
            for _, _, numbers in ancillary:
                fds.frombytes(numbers)
        return data, list(fds)

    def _answer(self, received: Received) -> bytes | Hangup | WithFd | None:
        special = self.answers.get(received.request)
        if special is not None:
            for fd in received.fds:
                os.close(fd)
            return special(self, received)
        return self.polite(received)

    def polite(self, received: Received) -> bytes | WithFd | None:
        """What a good back-end says."""
        request, payload = received.request, received.payload
        if request == GET_INFLIGHT_FD:
            return region_for(payload)
        own = self._carry_out(received)
        if own is not None:
            return message(request, own)
        need_reply = received.flags & 8 and self.acked_protocol & REPLY_ACK
        return u64(request, 0) if need_reply and payload is not None else None

    def _carry_out(self, received: Received) -> bytes | None:
        payload, number = received.payload, received.number
        match received.request:
            case 1:
                return struct.pack("=Q", self.features)
            case 2:
                self.acked = number
            case 15:
                return struct.pack("=Q", self.protocol)
            case 16:
                self.acked_protocol = number
            case 17:
                return struct.pack("=Q", self.queues)
            case 36:
                return struct.pack("=Q", self.slots)
            case 22:
                return struct.pack("=Q", 0)
            case 39:
                self.status = number
            case 40:
                return struct.pack("=Q", self.status)
            case 24:
                offset, size, _ = struct.unpack_from("=III", payload)
                return payload[:12] + bytes(self.space[offset : offset + size]).ljust(size, b"\0")
            case 25:
                offset, size, _ = struct.unpack_from("=III", payload)
                self.space[offset : offset + size] = payload[12 : 12 + size]
            case 5:
                self.memory = []
                for at in range(8, len(payload), 32):
                    self._map(payload[at : at + 32], received.fds.pop(0))
            case 37:
                self._map(payload[8:], received.fds.pop(0))
            case 38:
                guest = struct.unpack_from("=Q", payload, 8)[0]
                self.memory = [region for region in self.memory if region[0] != guest]
            case 32:
                size, offset = struct.unpack_from("=QQ", payload)
                fd = received.fds.pop(0)
                file = os.fstat(fd)
                self.region_file, self.region = (file.st_dev, file.st_ino), mmap.mmap(fd, size, offset=offset)
                os.close(fd)
            case 6:
                fd = received.fds.pop(0)
                self.dirty = mmap.mmap(fd, *struct.unpack("=Q8x", payload))
                os.close(fd)
                return payload
            case 42:
                self._move_state(payload, received.fds.pop(0))
                return struct.pack("=Q", 0x100)
            case 43:
                if self._mover.ident is not None:
                    self._mover.join(WAIT_S)
                return struct.pack("=Q", 0)
            case 21:
                self.channel = socket.socket(fileno=received.fds.pop(0))
            case 8 | 9 | 10 | 11 | 12 | 13 | 14 | 18 | 45:
                return self._set_ring(received)
        return None

    def _move_state(self, params: bytes, fd: int) -> None:
        """On a thread, as it should be: the socket goes on meanwhile."""

        def move() -> None:
            with os.fdopen(fd, "rb" if params[0] else "wb") as file:
                if params[0]:
                    self.state = file.read()
                else:
                    file.write(self.state)

        self._mover = threading.Thread(target=move)
        self._mover.start()

    def _map(self, region: bytes, fd: int) -> None:
        guest, size, user, offset = struct.unpack("=QQQQ", region)
        self.memory.append((guest, user, size, mmap.mmap(fd, size + offset)))
        os.close(fd)

    def _set_ring(self, received: Received) -> bytes | None:
        index, number = struct.unpack_from("=II", received.payload)
        ring = self.rings.setdefault(index & 0xFF, Ring())
        match received.request:
            case 8:
                ring.size = number
            case 9:
                ring.desc, ring.used, ring.avail, log = struct.unpack_from("=QQQQ", received.payload, 8)
                ring.log = log if number & 1 else None
            case 10:
                ring.base = number
            case 11 | 45:
                self._selector.unregister(ring.kick)
                os.close(ring.kick)
                ring.kick = -1
                return struct.pack("=II", index, ring.base)
            case 12:
                ring.kick = received.fds.pop(0)
                self._selector.register(ring.kick, selectors.EVENT_READ, lambda: self._kicked(ring))
            case 13:
                ring.call = _replace(ring.call, received.fds.pop(0))
            case 14:
                ring.err = _replace(ring.err, received.fds.pop(0))
            case 18:
                ring.enabled = bool(number)
        return None

    def _kicked(self, ring: Ring) -> None:
        os.eventfd_read(ring.kick)
        self.device(self, ring)

    def at(self, address: int, length: int, *, user: bool = False) -> memoryview:
        """Memory at a guest address; ``user``: at an address of a ring, which is the guest's own behind an IOMMU."""
        for guest, base, size, mapped in self.memory:
            start = base if user and not self.acked & ACCESS_PLATFORM else guest
            if start <= address and address + length <= start + size:
                return memoryview(mapped)[address - start : address - start + length]
        raise AssertionError(f"the front-end gave no memory at {address:#x}")

    def take(self, ring: Ring) -> int | None:
        """The next head of a ring, or None."""
        avail = self.at(ring.avail, 4 + 2 * ring.size, user=True)
        if struct.unpack_from("<H", avail, 2)[0] == ring.base:
            return None
        head = int(struct.unpack_from("<H", avail, 4 + 2 * (ring.base % ring.size))[0])
        ring.base = (ring.base + 1) & 0xFFFF
        return head

    def chain(self, ring: Ring, head: int) -> list[tuple[int, int, bool]]:
        """(address, length, writable) of a chain, through its indirect table if it has one."""
        table, at, found = self.at(ring.desc, 16 * ring.size, user=True), head, []
        while True:
            address, length, flags, following = struct.unpack_from("<QIHH", table, 16 * at)
            if flags & 4:
                table, at = self.at(address, length), 0
                continue
            found.append((address, length, bool(flags & 2)))
            if not flags & 1:
                return found
            at = following

    def mark(self, address: int, length: int) -> None:
        """Note the pages of guest memory in the dirty log, if there is one."""
        if self.dirty is not None:
            for page in range(address // 4096, (address + length - 1) // 4096 + 1):
                self.dirty[page // 8] |= 1 << page % 8

    def put(self, ring: Ring, head: int, written: int, *, steps: int = 1) -> None:
        """Store a used entry and move the index by ``steps``."""
        used = self.at(ring.used, 4 + 8 * ring.size, user=True)
        index = struct.unpack_from("<H", used, 2)[0]
        struct.pack_into("<II", used, 4 + 8 * (index % ring.size), head, written)
        struct.pack_into("<H", used, 2, (index + steps) & 0xFFFF)

    def call(self, ring: Ring) -> None:
        """Tell the driver."""
        os.eventfd_write(ring.call, 1)


def region_for(payload: bytes, *, size: int | None = None, file_size: int | None = None) -> WithFd:
    """The answer to GET_INFLIGHT_FD: a region of zeroes, of the right ``size`` unless another one is told."""
    queues, descriptors = struct.unpack_from("=HH", payload, 16)
    needed = queues * (-(-(16 + 16 * descriptors) // 64) * 64)
    told = needed if size is None else size
    fd = os.memfd_create("region of a fake")
    os.ftruncate(fd, told if file_size is None else file_size)
    return WithFd(message(GET_INFLIGHT_FD, struct.pack("=QQHH4x", told, 0, queues, descriptors)), fd)


def _replace(old: int, new: int) -> int:
    if old >= 0:
        os.close(old)
    return new


def serve_disk(backend: FakeBackend, ring: Ring) -> None:
    """A disk: reads and writes of its bytes, everything else succeeds."""
    while (head := backend.take(ring)) is not None:
        answer(backend, ring, head)
    backend.call(ring)


def answer(backend: FakeBackend, ring: Ring, head: int, status: int = 0) -> None:
    """Carry one request out, unless ``status`` says that it fails, and give it back."""
    backend.put(ring, head, carry_out(backend, ring, head, status))


def carry_out(backend: FakeBackend, ring: Ring, head: int, status: int = 0) -> int:
    """Do what a request asks, and return how much was written into memory for it."""
    chain = backend.chain(ring, head)
    backend.chains.append(chain)
    kind, _, sector = struct.unpack("<IIQ", bytes(backend.at(*chain[0][:2])))
    at, written = sector * 512, 1
    for address, length, writable in chain[1:-1] if status == 0 else ():
        if kind == IN:
            assert writable
            backend.at(address, length)[:] = backend.disk[at : at + length]
            written += length
        elif kind == OUT:
            assert not writable
            backend.disk[at : at + length] = backend.at(address, length)
        at += length
    backend.at(chain[-1][0], 1)[0] = status
    return written
