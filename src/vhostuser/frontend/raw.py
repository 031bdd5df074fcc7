"""A front-end without manners, for testers: any bytes, any descriptors, any ring. Touches one socket, shared memory.

Nothing here is checked on the way out, and nothing is interpreted on the way in. For chains that are merely odd (any
framing, direction or address) `plain_queue` is enough; `RawRing` writes what no driver would.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from struct import Struct
from types import TracebackType
from typing import Final, Self

from vhostuser.errors import PeerGone
from vhostuser.fds import Fd
from vhostuser.frontend.memory import SharedMemory
from vhostuser.frontend.queue import HostQueue, check_size, eventfd, ring_areas, ring_bytes
from vhostuser.frontend.reach import Endpoint, reach
from vhostuser.protocol.ids import VERSION
from vhostuser.transport import Transport

HEADER: Final = Struct("=III")
DESCRIPTOR: Final = Struct("<QIHH")
USED: Final = Struct("<II")
U16: Final = Struct("<H")

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4


@dataclass(frozen=True)
class RawMessage:
    """What came back: the three numbers of the header, the payload, and the descriptors, which are the caller's."""

    request: int
    flags: int
    size: int
    payload: bytes
    fds: tuple[Fd, ...] = ()


class RawFrontend:
    """One connection as bytes. One thread at a time. Every wait has the time limit, and raises `PeerGone` after it."""

    def __init__(self, endpoint: Endpoint, *, listen: bool = False, timeout_s: float = 10.0) -> None:
        """Reach ``endpoint`` as `HostDevice` does. The transport of a `Dialogue` may be shared while that is quiet."""
        self.transport: Final[Transport] = reach(endpoint, listen=listen, timeout_s=timeout_s)
        self._timeout_s = timeout_s

    def send(
        self,
        request: int,
        payload: bytes = b"",
        *,
        flags: int = VERSION,
        size: int | None = None,
        fds: Sequence[Fd] = (),
    ) -> None:
        """Send a header, ``payload``, and ``fds`` with the first byte; ``size`` is what the header says it to be."""
        self.send_bytes(HEADER.pack(request, flags, len(payload) if size is None else size) + payload, fds)

    def send_bytes(self, data: bytes, fds: Sequence[Fd] = ()) -> None:
        """Send ``data`` as it is, with ``fds`` attached to its first byte; they stay the caller's."""
        self.transport.send(data, fds)

    def receive(self) -> RawMessage | None:
        """The next whole message; None when the back-end closed the connection instead."""
        header, fds = self.receive_bytes(HEADER.size)
        if not header:
            return None
        if len(header) < HEADER.size:
            raise PeerGone(f"the connection ended after {len(header)} bytes of a header")
        request, flags, size = HEADER.unpack(header)
        payload, more = self.receive_bytes(size)
        if len(payload) < size:
            raise PeerGone(f"the connection ended after {len(payload)} of {size} bytes of payload")
        return RawMessage(request, flags, size, payload, (*fds, *more))

    def receive_bytes(self, count: int) -> tuple[bytes, list[Fd]]:
        """``count`` bytes and the descriptors that came with them; fewer when the back-end closed the connection."""
        data, fds = b"", list[Fd]()
        deadline = time.monotonic() + self._timeout_s
        poll = select.poll()
        poll.register(self.transport.fileno(), select.POLLIN)
        while len(data) < count:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                for fd in fds:
                    fd.close()
                raise PeerGone(f"the back-end sent {len(data)} of {count} bytes within {self._timeout_s:g} s")
            more, came = self.transport.receive(count - len(data))
            if not more:
                break
            data += more
            fds += came
        return data, fds

    def exchange(
        self, request: int, payload: bytes = b"", *, flags: int = VERSION, fds: Sequence[Fd] = ()
    ) -> RawMessage | None:
        """`send`, then `receive`."""
        self.send(request, payload, flags=flags, fds=fds)
        return self.receive()

    def closed_by_peer(self) -> bool:
        """Wait until the back-end closes the connection; False when it sends something or keeps it open."""
        try:
            data, fds = self.receive_bytes(1)
        except PeerGone:
            return False
        for fd in fds:
            fd.close()
        return not data

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class DescriptorKind(Enum):
    """Things that can be attached to a message in place of what belongs there."""

    EVENTFD = auto()
    MEMFD = auto()  # of one page
    EMPTY_MEMFD = auto()
    PIPE_READ_END = auto()
    PIPE_WRITE_END = auto()
    NULL_DEVICE = auto()
    DIRECTORY = auto()
    EPOLL = auto()
    SOCKET = auto()

    def make(self) -> Fd:
        """A new one; the other end of a pipe or socket is closed."""
        match self:
            case DescriptorKind.EVENTFD:
                return eventfd()
            case DescriptorKind.MEMFD | DescriptorKind.EMPTY_MEMFD:
                made = Fd(os.memfd_create("vhostuser-raw"))
                os.ftruncate(made.fileno(), 4096 if self is DescriptorKind.MEMFD else 0)
                return made
            case DescriptorKind.PIPE_READ_END | DescriptorKind.PIPE_WRITE_END:
                ends = [Fd(end) for end in os.pipe()]
                kept = ends.pop(0 if self is DescriptorKind.PIPE_READ_END else 1)
                ends[0].close()
                return kept
            case DescriptorKind.NULL_DEVICE:
                return Fd(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
            case DescriptorKind.DIRECTORY:
                return Fd(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            case DescriptorKind.EPOLL:
                with select.epoll() as poll:
                    return Fd(os.dup(poll.fileno()))
            case DescriptorKind.SOCKET:
                ours, theirs = Transport.pair()
                ours.close()
                return theirs


class RawRing:
    """A split ring written byte by byte, in an arena. One thread at a time.

    It keeps no books: what is in the ring is what was stored. Stores are made in the order of the calls.
    """

    def __init__(self, memory: SharedMemory, size: int, areas: tuple[int, int, int]) -> None:
        """``areas``: arena offsets of the descriptor table, the available ring and the used ring. They are zeroed."""
        self.memory: Final = memory
        self.size: Final = size
        self._view = memory.view
        self._desc, self._avail, self._used = areas
        self._seen = 0
        for start, length in zip(areas, (16 * size, 6 + 2 * size, 6 + 8 * size), strict=True):
            self._view[start : start + length] = bytes(length)

    def descriptor(self, index: int, addr: int, length: int, flags: int = 0, next_: int = 0) -> None:
        """Store one entry of the descriptor table."""
        DESCRIPTOR.pack_into(self._view, self._desc + 16 * index, addr, length, flags, next_)

    def table(self, offset: int, entries: Iterable[tuple[int, int, int, int]]) -> None:
        """Store (addr, length, flags, next) entries anywhere in the arena: an indirect table."""
        for number, entry in enumerate(entries):
            DESCRIPTOR.pack_into(self._view, offset + 16 * number, *entry)

    def offer(self, *heads: int) -> None:
        """Put heads, which may be any numbers of 16 bits, into the next places, then move the index past them."""
        index = self.avail_index
        for head in heads:
            U16.pack_into(self._view, self._avail + 4 + 2 * (index % self.size), head)
            index += 1
        self.avail_index = index & 0xFFFF

    @property
    def avail_index(self) -> int:
        """``avail.idx``. It can be set to anything."""
        return self._u16(self._avail + 2)

    @avail_index.setter
    def avail_index(self, value: int) -> None:
        U16.pack_into(self._view, self._avail + 2, value)

    @property
    def avail_flags(self) -> int:
        """``avail.flags``: 1 asks for no calls."""
        return self._u16(self._avail)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        U16.pack_into(self._view, self._avail, value)

    @property
    def used_event(self) -> int:
        """``used_event``, after the entries of the available ring."""
        return self._u16(self._avail + 4 + 2 * self.size)

    @used_event.setter
    def used_event(self, value: int) -> None:
        U16.pack_into(self._view, self._avail + 4 + 2 * self.size, value)

    @property
    def used_index(self) -> int:
        """``used.idx``."""
        return self._u16(self._used + 2)

    @property
    def used_flags(self) -> int:
        """``used.flags``: 1 says that no kicks are needed."""
        return self._u16(self._used)

    @property
    def avail_event(self) -> int:
        """``avail_event``, after the entries of the used ring."""
        return self._u16(self._used + 4 + 8 * self.size)

    def used(self) -> list[tuple[int, int]]:
        """(id, length) of what the back-end has used since the last time, a whole ring at most."""
        index = self.used_index
        count = min((index - self._seen) & 0xFFFF, self.size)
        found: list[tuple[int, int]] = []
        for number in range(count):
            at = self._used + 4 + 8 * ((self._seen + number) % self.size)
            found.append(USED.unpack_from(self._view, at))
        self._seen = index
        return found

    def _u16(self, at: int) -> int:
        value: int = U16.unpack_from(self._view, at)[0]
        return value


def raw_queue(memory: SharedMemory, index: int, size: int) -> HostQueue[RawRing]:
    """A `RawRing` with its eventfds, in room that is reserved for it, for `HostDevice.start`: see `ring_bytes`."""
    check_size(size)
    areas = ring_areas(memory.reserve(ring_bytes(size)), size)
    return HostQueue(memory, index, size, RawRing(memory, size, areas), areas)
