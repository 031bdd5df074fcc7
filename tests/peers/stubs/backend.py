"""A back-end that answers from a script, one connection after the other, on a thread of its own.

Whatever a front-end does that the program in question would not put up with is a complaint, and ends the connection.
Touches: its listening socket, the connection, what the front-end sends.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .disk import MemoryDisk
from .ring import Memory, Ring
from .wire import HEADER, Closed, Request, close_all, receive, reply

U64: Final = struct.Struct("=Q")
STATE: Final = struct.Struct("=II")
ADDR: Final = struct.Struct("=IIQQQQ")
REGION: Final = struct.Struct("=QQQQ")
CONFIG: Final = struct.Struct("=III")
NO_FD: Final = 0x100
REPLY_ACK: Final = 1 << 3
PROTOCOL_FEATURES: Final = 1 << 30
VERSION_1: Final = 1 << 32
WRITEBACK: Final = 32
OWN_REPLY: Final = frozenset({1, 11, 15, 17, 24, 36})
BATCH: Final = 64


class Complaint(Exception):  # noqa: N818 - what the program says before it closes
    """What the program would close the connection for."""


@dataclass(frozen=True, slots=True)
class Script:
    """One program: its recorded answers, and what it does and does not put up with."""

    name: str
    answers: Mapping[int, bytes]  # request -> the whole answer, header included
    config: bytes  # its configuration space
    config_answer: Callable[[bytes, bytes], bytes]  # (request's payload, configuration) -> the answer's payload
    known: frozenset[int]  # requests it knows
    shunned: int = 0  # protocol features that must not be acknowledged, since this program means something else by them
    exact_sizes: bool = False  # payloads must be exactly as long as their structure
    needs_version_1: bool = False
    mask_for_bit_30: bool = False  # tests "features & 30" where bit 30 is meant
    max_regions: int = 8
    disk: Callable[[], MemoryDisk] = field(default=lambda: MemoryDisk(8 << 20))

    def word(self, request: int) -> int:
        """The number that the recorded answer to ``request`` carries."""
        return int(U64.unpack(self.answers[request][HEADER.size :])[0])


class StubBackend:
    """A script, running. `complaints` and `seen` may be read once the connection has ended."""

    def __init__(self, script: Script, socket_path: Path) -> None:
        """Listen, and serve from a new thread."""
        self.script = script
        self.socket_path = socket_path
        self.disk = script.disk()
        self.config = bytearray(script.config)
        self.complaints: list[str] = []
        self.seen: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(socket_path))
        self._listener.listen(1)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"stub {script.name}")
        self._thread.start()

    def close(self) -> None:
        """End the thread, the connection and the socket. Idempotent."""
        if not self._thread.is_alive():
            return
        self._wake.close()
        self._thread.join()
        self._listener.close()
        self._woken.close()
        self.socket_path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not any(key.fileobj is self._woken for key, _ in selector.select()):
                connection, _ = self._listener.accept()
                with connection:
                    _Session(self, connection, self._woken).run()


class _Session:
    """One connection and its rings."""

    def __init__(self, stub: StubBackend, connection: socket.socket, stop: socket.socket) -> None:
        self._stub = stub
        self._script = stub.script
        self._connection = connection
        self._stop = stop
        self._memory = Memory()
        self._rings: dict[int, Ring] = {}
        self._features = 0
        self._protocol_features = 0

    def run(self) -> None:
        """Serve until either side ends it."""
        try:
            while self._turn():
                pass
        except (Closed, ConnectionError):
            return
        except (Complaint, LookupError, struct.error) as complaint:
            self._stub.complaints.append(f"{self._script.name}: {complaint}")
        finally:
            for ring in self._rings.values():
                ring.close()

    def _turn(self) -> bool:
        """Wait for a message or a kick and deal with it; False when the stub is to end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            selector.register(self._stop, selectors.EVENT_READ)
            for ring in self._rings.values():
                if ring.ready() and ring.kick is not None:
                    selector.register(ring.kick, selectors.EVENT_READ, ring)
            ready = [key for key, _ in selector.select()]
        for key in ready:
            if key.fileobj is self._stop:
                return False
            if key.fileobj is self._connection:
                self._message(receive(self._connection))
                return True
            if isinstance(key.data, Ring) and key.data.kick is not None:
                os.read(key.data.kick, 8)
                self._serve(key.data)
        return True

    def _serve(self, ring: Ring) -> None:
        """Answer what a ring holds, and arm its kick; a long queue is left now and then for the socket."""
        while ring.ready():
            for _ in range(BATCH):
                if (chain := ring.take()) is None:
                    break
                ring.give(chain.head, self._stub.disk.answer(chain))
            if not ring.ask_for_kicks():
                return

    def _ring(self, index: int) -> Ring:
        """A ring that may not have been mentioned yet."""
        if index >= 64:
            raise Complaint(f"queue {index} of 64")
        ring = self._rings.setdefault(index, Ring())
        ring.memory, ring.features = self._memory, self._features
        return ring

    def _message(self, request: Request) -> None:
        self._stub.seen.append(request.number)
        if request.flags & ~8 != 1:
            raise Complaint(f"flags {request.flags:#x} of a request")
        if request.number not in self._script.known:
            raise Complaint(f"request {request.number}, which it does not know")
        if request.number in self._script.answers:
            self._connection.sendall(self._script.answers[request.number])
            return
        answer = self._carry_out(request)
        if answer is not None:
            self._connection.sendall(reply(request.number, answer))
        elif request.need_reply:
            if not self._protocol_features & REPLY_ACK:
                raise Complaint(f"request {request.number} asks for an acknowledgement that was never negotiated")
            self._connection.sendall(reply(request.number, U64.pack(0)))

    def _carry_out(self, request: Request) -> bytes | None:
        """Do what a request says; returns the payload of its own answer, if it has one."""
        if self._script.exact_sizes:
            self._check_size(request)
        match request.number:
            case 2:
                self._set_features(U64.unpack(request.payload)[0])
            case 16:
                self._set_protocol_features(U64.unpack(request.payload)[0])
            case 5:
                self._set_memory(request)
            case 37:
                self._memory.add(REGION.unpack_from(request.payload, 8), request.fds[0])
            case 8 | 9 | 10 | 11 | 18:
                return self._vring(request)
            case 12 | 13 | 14:
                self._descriptor(request)
            case 24:
                return self._script.config_answer(request.payload, bytes(self._stub.config))
            case 25:
                self._set_config(request.payload)
            case 21:
                close_all(request.fds)
        return None

    def _check_size(self, request: Request) -> None:
        sizes = {2: 8, 3: 0, 8: 8, 9: 40, 10: 8, 11: 8, 12: 8, 13: 8, 14: 8, 16: 8, 18: 8, 21: 0, 37: 40}
        expected = sizes.get(request.number)
        if request.number == 5:
            expected = 8 + 32 * int.from_bytes(request.payload[:4], "little")
        if request.number in (24, 25):
            expected = CONFIG.size + CONFIG.unpack_from(request.payload)[1]
        if expected is not None and len(request.payload) != expected:
            raise Complaint(f"request {request.number} of {len(request.payload)} bytes instead of {expected}")

    def _set_features(self, features: int) -> None:
        unknown = features & ~self._script.word(1)
        if unknown:
            raise Complaint(f"features {unknown:#x} that were not offered")
        if self._script.needs_version_1 and not features & VERSION_1:
            raise Complaint("a driver without VERSION_1")
        self._features = features
        enabling = 30 if self._script.mask_for_bit_30 else PROTOCOL_FEATURES
        for ring in self._rings.values():
            ring.features = features
            ring.enabled = ring.enabled or not features & enabling

    def _set_protocol_features(self, features: int) -> None:
        unknown = features & ~self._script.word(15)
        if unknown:
            raise Complaint(f"protocol features {unknown:#x} that were not offered")
        if features & self._script.shunned:
            raise Complaint(f"protocol feature {features & self._script.shunned:#x}, of which it has another idea")
        self._protocol_features = features

    def _set_memory(self, request: Request) -> None:
        count = int.from_bytes(request.payload[:4], "little")
        if count > self._script.max_regions or count != len(request.fds):
            close_all(request.fds)
            raise Complaint(f"{count} regions with {len(request.fds)} descriptors")
        self._memory = Memory()
        for number, fd in enumerate(request.fds):
            self._memory.add(REGION.unpack_from(request.payload, 8 + REGION.size * number), fd)
        for ring in self._rings.values():
            ring.memory = self._memory

    def _vring(self, request: Request) -> bytes | None:
        if request.number == 9:
            index, _, descriptors, used, available, _ = ADDR.unpack(request.payload)
            self._ring(index).addr = (descriptors, used, available)
            return None
        index, num = STATE.unpack(request.payload)
        ring = self._ring(index)
        if request.number == 8:
            if not 0 < num <= 1024 or num & (num - 1):
                raise Complaint(f"a queue of {num}")
            ring.num = num
        elif request.number == 10:
            if num > 0xFFFF:
                raise Complaint(f"base {num:#x} of a split ring")
            ring.base = num
        elif request.number == 18:
            ring.enabled = bool(num)
            if ring.ready():
                self._serve(ring)
        else:
            ring.close()
            return STATE.pack(index, ring.base)
        return None

    def _descriptor(self, request: Request) -> None:
        (word,) = U64.unpack(request.payload)
        ring = self._ring(word & 0xFF)
        if len(request.fds) != (0 if word & NO_FD else 1):
            close_all(request.fds)
            raise Complaint(f"{len(request.fds)} descriptors with {word:#x}")
        name = {12: "kick", 13: "call"}.get(request.number)
        if name is None:
            close_all(request.fds)
            return
        old = getattr(ring, name)
        if old is not None:
            os.close(old)
        setattr(ring, name, request.fds[0] if request.fds else None)
        if name == "kick" and ring.ready():
            self._serve(ring)

    def _set_config(self, payload: bytes) -> None:
        offset, size, _ = CONFIG.unpack_from(payload)
        if (offset, size) != (WRITEBACK, 1):
            raise Complaint(f"configuration bytes {offset}+{size} written")
        self._stub.config[WRITEBACK] = payload[CONFIG.size]
