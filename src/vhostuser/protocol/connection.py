"""One vhost-user connection as a pure state machine, for either end. Touches nothing.

Bytes and descriptors go in and come out; descriptors are opaque tokens here, so tests may pass strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final, Generic, NoReturn, TypeVar

from vhostuser.errors import LocalProtocolError, RemoteProtocolError
from vhostuser.protocol.framing import Frame, Framer, Header
from vhostuser.protocol.ids import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    MAX_PAYLOAD,
    VERSION,
    BackendRequest,
    FrontendRequest,
    ProtocolFeature,
)
from vhostuser.protocol.layout import Payload, Violation
from vhostuser.protocol.messages import Message, Refused, Reply, identify, name_of
from vhostuser.protocol.negotiation import Fatal, Negotiation
from vhostuser.protocol.payloads import U64, Config, Nothing, Raw
from vhostuser.protocol.rules import Fds, Rule, rule_of

F = TypeVar("F")

REPLY_FLAGS: Final = VERSION | FLAG_REPLY


class Role(Enum):
    """Which end of the connection we are."""

    FRONTEND = auto()
    BACKEND = auto()


CONFIG_UNION: Final = 12 + 256
"""The structure of GET_CONFIG in C, with room for 256 bytes: SPDK answers with all of it, whatever was asked."""


@dataclass(frozen=True, slots=True)
class _Due:
    """An answer that is owed: to the peer, or by it."""

    event: object  # the Message or Refused
    request: int
    payload: Payload
    size: int  # of the request's payload
    rule: Rule

    @property
    def own(self) -> bool:
        """True for an own reply, False for an acknowledgement."""
        return self.rule.reply is not None

    @property
    def fds(self) -> Fds:
        """What comes with the answer."""
        return self.rule.reply_fds if self.own else Fds.NONE

    def write(self, payload: Payload) -> bytes:
        """Return the bytes of the own reply ``payload``. Raises `Violation` when it is not one."""
        kind = self.rule.reply
        if kind is None or type(payload) is not kind:
            raise Violation(f"is {kind.__name__ if kind else 'nothing'}, not {type(payload).__name__}")
        data = payload.pack()
        if isinstance(payload, Config) and payload.size:
            if isinstance(self.payload, Config) and payload.size != self.payload.size:
                raise Violation(f"{self.payload.size} bytes were asked for, not {payload.size}")
            data = data.ljust(self.size, b"\0")
        if len(data) > MAX_PAYLOAD:
            raise Violation(f"{len(data)} bytes of payload are more than {MAX_PAYLOAD}")
        return data

    def read(self, data: bytes) -> Payload:
        """Return the answer in ``data``. Raises `Violation` when it is not one."""
        kind = self.rule.reply
        if kind is None:
            return U64.unpack(data)
        if kind is Config:
            return self._read_config(data)
        if self.rule.any_reply:
            with suppress(Violation):
                return kind.unpack(data)
            return Raw(data)
        return kind.unpack(data)

    def _read_config(self, data: bytes) -> Config:
        """The failure has two dialects: no payload at all (libvhost-user), and one that says 0 bytes (rust-vmm)."""
        config = Config.unpack(data) if data else Config(0, 0, 0, b"")
        if config.size == 0:
            return config
        asked = self.payload
        if not isinstance(asked, Config):
            raise Violation("does not belong to what was asked")
        whole = config.size == CONFIG_UNION - Config.HEAD.size >= asked.size
        if len(data) not in (self.size, CONFIG_UNION) or not (config.size == asked.size or whole):
            raise Violation(f"{self.size} bytes of payload were asked for, not {len(data)}")
        if config.offset != asked.offset:
            raise Violation(f"offset {asked.offset} was asked for, not {config.offset}")
        return replace(config, size=asked.size, data=config.data[: asked.size])


class Connection(Generic[F]):
    """One end of a main connection, or (``nested``) of a back-end channel, where the back-end sends the requests.

    The end that is asked takes every message with `next_event` and follows it by `answer` when it has an own reply,
    else by `acknowledge`. The end that asks uses `send` and finds each `Reply` in `next_event`.
    """

    def __init__(self, role: Role, *, nested: bool = False, main: Connection[F] | None = None) -> None:
        """Begin in front of the first message.

        ``main`` is the connection whose channel a nested one is: its negotiation decides what is legal here, too.
        A nested one without it takes everything for negotiated.
        """
        self.role: Final = role
        self.nested: Final = nested
        self.closed = False
        self._asks = (role is Role.FRONTEND) is not nested
        self._framer: Framer[F] = Framer()
        self._refused: list[F] = []
        self._owed: _Due | None = None  # by us
        self._expected: _Due | None = None  # by the peer
        self._negotiation: Final[Negotiation] = _negotiation_of(main, nested=nested)

    def offer(self, features: int, protocol_features: ProtocolFeature) -> None:
        """Say, as the back-end, what is offered, so that a front-end that does not ask is held to it, too."""
        self._negotiation.features_offered = int(features)  # the inverse of a flag knows none but the named bits
        self._negotiation.protocol_features_offered = protocol_features

    @property
    def want(self) -> int:
        """How many bytes to read next: up to the end of the header or the payload. 0 once the connection is over."""
        if self.closed:
            return 0
        return self._framer.want

    @property
    def features(self) -> int:
        """The feature bits that SET_FEATURES set last; 0 before."""
        return self._negotiation.features

    @property
    def protocol_features(self) -> ProtocolFeature:
        """The bits that SET_PROTOCOL_FEATURES set last; none before."""
        return self._negotiation.protocol_features

    @property
    def features_offered(self) -> int | None:
        """What GET_FEATURES answered last, or `offer` said; None before."""
        return self._negotiation.features_offered

    @property
    def protocol_features_offered(self) -> ProtocolFeature | None:
        """What GET_PROTOCOL_FEATURES answered last, or `offer` said; None before."""
        return self._negotiation.protocol_features_offered

    @property
    def awaits_reply(self) -> bool:
        """True while the peer owes us an answer; until it came nothing can be sent that wants one, too."""
        return self._expected is not None

    def receive(self, data: bytes, fds: Sequence[F] = ()) -> None:
        """Take what one read returned; no bytes mean that the peer closed its end.

        Reads of at most `want` bytes keep descriptors with their message, whatever the kernel merges. Takes ``fds``.
        """
        if self.closed:
            self._refused += fds
        else:
            self._framer.feed(data, fds)

    def next_event(self) -> Message[F] | Reply[F] | Refused | None:
        """Return what arrived next, or None when that is not yet complete, or never will be: see `closed`.

        Raises `RemoteProtocolError` when the connection cannot go on, and `LocalProtocolError` while the answer to the
        previous message is still owed and another one is there.
        """
        if self.closed:
            return None
        if self._owed is not None and self._framer.ready:
            raise LocalProtocolError(f"{name_of(self._owed.request)} has to be answered before the next message")
        frame = self._framer.take()
        if frame is not None:
            return self._understand_reply(frame) if self._asks else self._understand_request(frame)
        if self._framer.broken is not None:
            self._fail(str(self._framer.broken))
        if self._framer.ended:
            if self._framer.inside:
                self._fail("the stream ends in the middle of a message")
            self.close()
        return None

    def send(self, message: Message[F]) -> tuple[bytes, tuple[F, ...]]:
        """Return the bytes of a request and the descriptors to attach to their first one.

        Raises `LocalProtocolError` for what may not be sent now; nothing has changed then.
        """
        request = identify(message.request, nested=self.nested)
        try:
            payload, rule = self._check_sent(request, message)
        except Violation as violation:
            raise LocalProtocolError(f"{name_of(message.request)}: {violation}") from violation
        if not self.nested:
            self._negotiation.apply(request, message.payload)
        if rule.reply is not None or message.need_reply:
            self._expected = _Due(message, request, message.payload, len(payload), rule)
        flags = VERSION | (FLAG_NEED_REPLY if message.need_reply else 0)
        return Header(request, flags, len(payload)).pack() + payload, message.fds

    def answer(self, message: Message[F], payload: Payload, fds: tuple[F, ...] = ()) -> tuple[bytes, tuple[F, ...]]:
        """Return the own reply of a received message and its descriptors. Raises `LocalProtocolError` if it has none.

        The reply to GET_CONFIG is as long as the request was.
        """
        owed = self._owed
        if owed is None or owed.event != message or not owed.own:
            raise LocalProtocolError(f"{name_of(message.request)} has no own reply to be sent now")
        try:
            data = owed.write(payload)
            owed.fds.settle(payload, fds, sending=True)
        except Violation as violation:
            raise LocalProtocolError(f"reply to {name_of(owed.request)}: {violation}") from violation
        self._owed = None
        if not self.nested:
            self._negotiation.answered(owed.request, payload)
        return Header(owed.request, REPLY_FLAGS, len(data)).pack() + data, fds

    def acknowledge(self, event: Message[F] | Refused, code: int = 0) -> tuple[bytes, tuple[F, ...]] | None:
        """Return the acknowledgement of a received message, 0 for success, or None when none is due.

        A message with an own reply can be acknowledged only with a failure: this returns the error form of that
        reply, or None when the specification has none. None for a failure means that only closing tells the peer.
        """
        owed = self._owed
        if owed is None:
            return None
        if owed.event != event:
            raise LocalProtocolError(f"{name_of(owed.request)} has to be answered before {name_of(event.request)}")
        form: Payload = U64(code)
        if owed.own:
            if code == 0:
                raise LocalProtocolError(f"{name_of(owed.request)} has an own reply")
            if owed.rule.failure is None:
                return None
            form = owed.rule.failure(code)
        try:
            data = form.pack()
        except Violation as violation:
            raise LocalProtocolError(f"acknowledgement of {name_of(owed.request)}: {violation}") from violation
        self._owed = None
        return Header(owed.request, REPLY_FLAGS, len(data)).pack() + data, ()

    def refused_fds(self) -> tuple[F, ...]:
        """Return, once each, the descriptors that no message took over: refused or surplus. The caller closes them."""
        refused, self._refused = tuple(self._refused), []
        return refused

    def close(self) -> None:
        """End the connection; descriptors of messages not yet taken are among `refused_fds`."""
        self.closed = True
        self._refused += self._framer.abandon()

    def _fail(self, reason: str) -> NoReturn:
        self.close()
        raise RemoteProtocolError(reason)

    def _rule(self, request: int, size: int) -> Rule:
        """Return the rule that holds now for a request with ``size`` bytes of payload."""
        rule = rule_of(request).under(self.protocol_features)
        return rule.in_postcopy(size) if self._negotiation.postcopy and not self.nested else rule

    def _check_sent(self, request: int, message: Message[F]) -> tuple[bytes, Rule]:
        """Return the packed payload and the rule of a message that may be sent now; raise `Violation` for another."""
        if self.closed:
            raise Violation("the connection is closed")
        if not self._asks:
            raise Violation("this end answers requests and sends none")
        if isinstance(message.request, FrontendRequest if self.nested else BackendRequest):
            raise Violation("the request belongs on the other channel")
        if not 0 <= request <= 0xFFFF_FFFF:
            raise Violation("a request is a number of 32 bits")
        payload = message.payload
        data = payload.pack()
        if len(data) > MAX_PAYLOAD:
            raise Violation(f"{len(data)} bytes of payload are more than {MAX_PAYLOAD}")
        rule = self._rule(request, len(data))
        if type(payload) is not rule.payload:
            raise Violation(f"carries {rule.payload.__name__}, not {type(payload).__name__}")
        rule.check_values(payload)
        self._negotiation.check_needs(rule, sending=True)
        self._check_channel(rule.fds.settle(payload, message.fds, sending=True)[0])
        if not self.nested:
            self._negotiation.check_choice(request, payload, sending=True)
        acks = self._negotiation.acks() if self.nested else self._negotiation.acks_with(request, payload)
        if message.need_reply and not acks:
            raise Violation("an acknowledgement needs protocol feature REPLY_ACK")
        if self._expected is not None and (message.need_reply or rule.reply is not None):
            raise Violation(f"{name_of(self._expected.request)} is not answered yet")
        return data, rule

    def _check_channel(self, fds: tuple[F, ...]) -> None:
        if self.nested and fds and ProtocolFeature.BACKEND_SEND_FD not in self.protocol_features:
            raise Violation("protocol feature BACKEND_SEND_FD is not negotiated")

    def _understand_request(self, frame: Frame[F]) -> Message[F] | Refused:
        header = frame.header
        request = identify(header.request, nested=self.nested)
        need_reply = bool(header.flags & FLAG_NEED_REPLY)
        rule = self._rule(request, header.size)
        payload: Payload = Nothing()
        event: Message[F] | Refused
        try:
            if header.flags & FLAG_REPLY:
                raise Fatal("a reply came where only requests may")
            if header.size or not rule.may_be_empty:
                payload = rule.payload.unpack(frame.payload)
            rule.check_values(payload)
            self._negotiation.check_needs(rule, sending=False)
            kept, surplus = rule.fds.settle(payload, frame.fds, sending=False)
            self._check_channel(kept)
            if not self.nested:
                self._negotiation.check_choice(request, payload, sending=False)
        except Violation as violation:
            self._refused += frame.fds
            if isinstance(violation, Fatal):
                self._fail(f"{name_of(request)}: {violation}")
            event = Refused(request, header.size, str(violation), need_reply)
        else:
            self._refused += surplus
            if not self.nested:
                self._negotiation.apply(request, payload)
            event = Message(request, payload, kept, need_reply)
        if rule.reply is not None or (need_reply and self._negotiation.acks()):
            self._owed = _Due(event, request, payload, header.size, rule)
        return event

    def _understand_reply(self, frame: Frame[F]) -> Reply[F]:
        header = frame.header
        request = identify(header.request, nested=self.nested)
        expected = self._expected
        try:
            if header.flags != REPLY_FLAGS:
                raise Violation(f"its flags are {header.flags:#x} where a reply has {REPLY_FLAGS:#x}")
            if expected is None:
                raise Violation("a reply came that nothing asked for")
            if request != expected.request:
                raise Violation(f"a reply came while {name_of(expected.request)} was to be answered")
            payload = expected.read(frame.payload)
            kept, surplus = expected.fds.settle(payload, frame.fds, sending=False)
        except Violation as violation:
            self._refused += frame.fds
            self._fail(f"{name_of(request)}: {violation}")
        self._refused += surplus
        self._expected = None
        if not self.nested:
            self._negotiation.answered(request, payload)
        return Reply(request, payload, kept, ack=not expected.own)


def _negotiation_of(main: Connection[F] | None, *, nested: bool) -> Negotiation:
    if main is not None:
        return main._negotiation
    return Negotiation.everything() if nested else Negotiation()
