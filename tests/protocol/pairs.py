"""Two connections joined in one process: what one sends, the other must report."""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from vhostuser.protocol import (
    U64,
    Connection,
    FrontendRequest,
    Message,
    Payload,
    ProtocolFeature,
    Refused,
    Reply,
    Role,
)

HEADER = Struct("=III")
NEED_REPLY = 0x8
REPLY = 0x4
XEN = ProtocolFeature.XEN_MMAP
ALL = ProtocolFeature((1 << 24) - 1)
USUAL = ALL & ~XEN
EVERY_BIT = (1 << 64) - 1
Event = Message[str] | Reply[str] | Refused | None


def wire(request: int, payload: bytes = b"", flags: int = 0, version: int = 1) -> bytes:
    """The bytes of one message, built without the code under test."""
    return HEADER.pack(request, version | flags, len(payload)) + payload


class Pair:
    """A front-end and a back-end connection; ``nested`` has a main pair, whose channel it is."""

    def __init__(self, main: Pair | None = None) -> None:
        nested = main is not None
        mains = (main.frontend, main.backend) if main is not None else (None, None)
        self.frontend: Connection[str] = Connection(Role.FRONTEND, nested=nested, main=mains[0])
        self.backend: Connection[str] = Connection(Role.BACKEND, nested=nested, main=mains[1])
        self.asker, self.asked = (self.backend, self.frontend) if nested else (self.frontend, self.backend)

    def ask(self, message: Message[str]) -> Message[str]:
        """Send a message and return what the other end reports."""
        self.asked.receive(*self.asker.send(message))
        event = self.asked.next_event()
        assert isinstance(event, Message)
        return event

    def answer(self, message: Message[str], payload: Payload, fds: tuple[str, ...] = ()) -> Reply[str]:
        """Send the own reply and return what the other end reports."""
        self.asker.receive(*self.asked.answer(message, payload, fds))
        event = self.asker.next_event()
        assert isinstance(event, Reply)
        return event

    def acknowledge(self, message: Message[str] | Refused, code: int = 0) -> Reply[str] | None:
        """Send the acknowledgement, if one is due, and return what the other end reports."""
        sent = self.asked.acknowledge(message, code)
        if sent is None:
            return None
        self.asker.receive(*sent)
        event = self.asker.next_event()
        assert isinstance(event, Reply)
        return event

    def push(self, data: bytes, fds: Iterable[str] = ()) -> Event:
        """Give raw bytes to the end that is asked, and return what it reports."""
        self.asked.receive(data, tuple(fds))
        return self.asked.next_event()


def negotiated(protocol_features: ProtocolFeature = USUAL, features: int = EVERY_BIT) -> Pair:
    """A pair after the opening messages, with these features acked."""
    pair = Pair()
    pair.answer(pair.ask(Message(FrontendRequest.GET_FEATURES)), U64(EVERY_BIT))
    pair.answer(pair.ask(Message(FrontendRequest.GET_PROTOCOL_FEATURES)), U64(ALL))
    if protocol_features:
        pair.ask(Message(FrontendRequest.SET_PROTOCOL_FEATURES, U64(protocol_features)))
    if features:
        pair.ask(Message(FrontendRequest.SET_FEATURES, U64(features)))
    return pair
