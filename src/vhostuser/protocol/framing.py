"""Cuts a byte stream with descriptors into frames (vhost-user: Header, Communication). Touches nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Generic, Self, TypeVar

from vhostuser.protocol.ids import FLAG_NEED_REPLY, FLAG_REPLY, MAX_FDS, MAX_PAYLOAD, VERSION, VERSION_MASK
from vhostuser.protocol.layout import Violation

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Header:
    """The first twelve bytes of a message."""

    LAYOUT: ClassVar[Struct] = Struct("=III")

    request: int
    flags: int
    size: int  # of the payload

    def pack(self) -> bytes:
        """Return the bytes on the wire."""
        return self.LAYOUT.pack(self.request, self.flags, self.size)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read exactly twelve bytes. Raises `Violation` when no message can begin with them."""
        header = cls(*cls.LAYOUT.unpack(data))
        if header.flags & VERSION_MASK != VERSION:
            raise Violation(f"message {header.request} has version {header.flags & VERSION_MASK}, not {VERSION}")
        if header.flags & ~(VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY):
            raise Violation(f"message {header.request} has unknown flags: {header.flags:#x}")
        if header.size > MAX_PAYLOAD:
            raise Violation(f"message {header.request} announces {header.size} bytes, more than {MAX_PAYLOAD}")
        return header


@dataclass(frozen=True, slots=True)
class Frame(Generic[F]):
    """One message, not yet understood."""

    header: Header
    payload: bytes
    fds: tuple[F, ...]


class Framer(Generic[F]):
    """Collects the pieces of a stream; whole frames come out of `take` in order.

    Descriptors belong to the message whose first byte arrives with them. After a broken frame nothing more is read.
    """

    def __init__(self) -> None:
        """Begin in front of a header."""
        self.broken: Violation | None = None
        self.ended = False
        self._header: Header | None = None
        self._data = bytearray()  # of the header, then of the payload
        self._fds: list[F] = []
        self._frames: deque[Frame[F]] = deque()
        self._lost: list[F] = []  # descriptors that no frame will carry

    @property
    def want(self) -> int:
        """How many bytes the message under way still lacks as far as known; 0 once nothing more is read."""
        if self.broken is not None or self.ended:
            return 0
        whole = Header.LAYOUT.size if self._header is None else self._header.size
        return whole - len(self._data)

    @property
    def inside(self) -> bool:
        """True when a message has begun and is not yet complete."""
        return self._header is not None or bool(self._data)

    def feed(self, data: bytes, fds: Sequence[F]) -> None:
        """Add what was received together; no bytes mean that the peer closed its end."""
        held = list(fds)
        at = 0
        while at < len(data) and self.want:
            if not self.inside:
                self._fds, held = held, []
                if len(self._fds) > MAX_FDS:
                    self.broken = Violation(f"{len(self._fds)} descriptors came with a message, more than {MAX_FDS}")
                    break
            piece = data[at : at + self.want]
            at += len(piece)
            self._data += piece
            self._advance()
        self._lost += held
        if held and data and not self.broken and not self.ended:
            self.broken = Violation("descriptors came in the middle of a message")
        if not data:
            self.ended = True

    def _advance(self) -> None:
        """Turn a complete header, and then a complete payload, into the next state."""
        if self.want:
            return
        if self._header is None:
            try:
                self._header = Header.unpack(bytes(self._data))
            except Violation as violation:
                self.broken = violation
                return
            self._data.clear()
        if not self.want:
            self._frames.append(Frame(self._header, bytes(self._data), tuple(self._fds)))
            self._header = None
            self._data.clear()
            self._fds = []

    @property
    def ready(self) -> bool:
        """True when `take` has a frame."""
        return bool(self._frames)

    def take(self) -> Frame[F] | None:
        """Return the next whole frame, or None."""
        return self._frames.popleft() if self._frames else None

    def abandon(self) -> tuple[F, ...]:
        """Forget everything not yet taken and return all of its descriptors; nothing more is read."""
        fds = [*self._lost, *self._fds, *(fd for frame in self._frames for fd in frame.fds)]
        self.ended = True
        self._lost, self._fds, self._header = [], [], None
        self._data.clear()
        self._frames.clear()
        return tuple(fds)
