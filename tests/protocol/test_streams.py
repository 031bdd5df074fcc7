"""Chop and hostile: any split of a stream gives the same events, and no input gives another error than two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.protocol.pairs import EVERY_BIT, USUAL, Pair, negotiated, wire
from tests.protocol.vectors import BACKEND_VECTORS, FRONTEND_VECTORS, Vector

from vhostuser.errors import LocalProtocolError, RemoteProtocolError
from vhostuser.protocol import (
    U64,
    BackendRequest,
    Config,
    Connection,
    DeviceStateReply,
    FrontendRequest,
    Inflight,
    MemoryRegion,
    MemoryTable,
    Message,
    Nothing,
    Payload,
    Raw,
    Refused,
    Reply,
    Role,
    ShmemConfig,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
    describe,
    rule_of,
)

Piece = tuple[bytes, tuple[str, ...]]
ENDS = [(role, nested) for role in Role for nested in (False, True)]


def pieces(vectors: Sequence[Vector], cuts: Sequence[int]) -> Iterator[Piece]:
    """The stream of messages as reads of at most `want` bytes, cut shorter as ``cuts`` says, in turn."""
    at = 0
    for vector in vectors:
        data, fds = wire(vector.request, vector.data), vector.fds
        ends = [12, len(data)] if vector.data else [12]
        start = 0
        for end in ends:
            while start < end:
                length = min(cuts[at % len(cuts)], end - start) if cuts else end - start
                at += 1
                yield data[start : start + length], fds
                start, fds = start + length, ()


def events(connection: Connection[str], stream: Iterator[Piece]) -> list[object]:
    """Feed a stream and answer what is to be answered."""
    found: list[object] = []
    for data, fds in stream:
        assert 0 < len(data) <= connection.want
        connection.receive(data, fds)
        while (event := connection.next_event()) is not None:
            found.append(event)
            assert isinstance(event, Message)
            settle(connection, event)
    return found


def settle(connection: Connection[str], event: Message[str] | Refused) -> bool:
    """Answer an event somehow; False when the connection would have to be closed."""
    if isinstance(event, Message):
        reply = rule_of(event.request).under(connection.protocol_features).reply
        if reply is not None:
            try:
                connection.answer(event, plausible(event, reply))
            except LocalProtocolError:
                return False
            return True
        try:
            connection.acknowledge(event)
        except LocalProtocolError:  # an own reply of postcopy
            return False
        return True
    return connection.acknowledge(event, 1) is not None


def plausible(event: Message[str], reply: type[Payload]) -> Payload:
    """A reply that may be sent."""
    if reply is U64:
        return U64(EVERY_BIT if event.request == FrontendRequest.GET_FEATURES else 0)
    if reply is DeviceStateReply:
        return DeviceStateReply.of()
    if reply is ShmemConfig:
        return ShmemConfig.of(())
    if reply is Inflight:
        return Inflight(0, 0, 0, 0)
    return event.payload if reply in (Config, VringState, Raw) else event.payload if reply is not Nothing else Nothing()


HARMLESS = [
    vector
    for vector in FRONTEND_VECTORS
    if vector.request
    not in (FrontendRequest.SET_FEATURES, FrontendRequest.SET_PROTOCOL_FEATURES, FrontendRequest.GET_PROTOCOL_FEATURES)
    and vector.request != FrontendRequest.POSTCOPY_LISTEN
]


def expected(vectors: Sequence[Vector]) -> list[object]:
    return [Message(vector.request, vector.payload, vector.fds) for vector in vectors]


def test_a_stream_byte_by_byte_gives_every_message() -> None:
    assert events(negotiated().backend, pieces(HARMLESS, [1])) == expected(HARMLESS)
    assert events(Pair(negotiated()).frontend, pieces(BACKEND_VECTORS, [1])) == expected(BACKEND_VECTORS)


@given(st.lists(st.sampled_from(HARMLESS), max_size=20), st.lists(st.integers(1, 50), max_size=30))
def test_any_split_of_a_stream_gives_the_same_messages(vectors: list[Vector], cuts: list[int]) -> None:
    assert events(negotiated().backend, pieces(vectors, cuts)) == expected(vectors)


@given(st.lists(st.sampled_from([v for v in HARMLESS if not v.fds]), max_size=20), st.integers(1, 200))
def test_reads_beyond_the_end_of_a_message_are_kept(vectors: list[Vector], length: int) -> None:
    stream = b"".join(wire(vector.request, vector.data) for vector in vectors)
    connection = negotiated().backend
    found: list[object] = []
    for start in range(0, len(stream), length):
        connection.receive(stream[start : start + length])
        while (event := connection.next_event()) is not None:
            found.append(event)
            assert isinstance(event, Message)
            settle(connection, event)
    assert found == expected(vectors)


def test_descriptors_of_a_long_read_belong_to_the_message_that_begins_in_it() -> None:
    connection = negotiated().backend
    owner = wire(FrontendRequest.SET_OWNER)
    call = wire(FrontendRequest.SET_VRING_CALL, VringFd.of(1).pack())
    connection.receive(owner[:6])
    connection.receive(owner[6:] + call, ("call",))
    assert connection.next_event() == Message(FrontendRequest.SET_OWNER)
    assert connection.next_event() == Message(FrontendRequest.SET_VRING_CALL, VringFd(1), ("call",))


def feed(connection: Connection[str], stream: Sequence[Piece]) -> None:
    """Do to a connection what a session does; every descriptor has to come out exactly once."""
    given_fds: Counter[str] = Counter()
    seen_fds: Counter[str] = Counter()
    for data, fds in stream:
        given_fds.update(fds)
        connection.receive(data, fds)
        assert connection.closed or connection.want >= 0
        try:
            while (event := connection.next_event()) is not None:
                assert describe(event)
                if isinstance(event, Message | Reply):
                    seen_fds.update(event.fds)
                if isinstance(event, Message | Refused) and not settle(connection, event):
                    connection.close()
        except RemoteProtocolError:
            assert connection.closed
        if connection.closed:
            assert connection.want == 0
        seen_fds.update(connection.refused_fds())
    connection.close()
    seen_fds.update(connection.refused_fds())
    assert seen_fds == given_fds


def opened(role: Role, nested: bool, negotiate: bool) -> Connection[str]:
    """One end, fresh or negotiated, that waits for a reply if it is the end that asks."""
    main = negotiated() if negotiate else Pair()
    pair = Pair(main) if nested else main
    connection = pair.frontend if role is Role.FRONTEND else pair.backend
    if connection is pair.asker and negotiate:
        request: int = BackendRequest.SHARED_OBJECT_LOOKUP if nested else FrontendRequest.GET_CONFIG
        vector = (BACKEND_VECTORS if nested else FRONTEND_VECTORS)[request - 1]
        connection.send(Message(vector.request, vector.payload))
    return connection


numbered_fds = st.integers(0, 40).map(lambda count: tuple(f"fd{number}" for number in range(count)))
some_fds = st.one_of(st.just(()), st.just(("a",)), st.just(("a", "b")), numbered_fds)
headers = st.builds(
    lambda request, flags, payload, short: wire(request, payload, flags)[: -short or None],
    st.integers(0, 50) | st.integers(0, 0xFFFF_FFFF),
    st.sampled_from([0, 0, 0, 4, 8, 12]) | st.integers(0, 0xFFFF_FFFE).map(lambda flags: flags & ~3),
    st.binary(max_size=120) | st.integers(0, 40).map(lambda count: bytes(8 * count)),
    st.sampled_from([0] * 9 + [1]),
)
anything = st.lists(st.tuples(st.binary(max_size=64) | headers, some_fds), max_size=12)


@pytest.mark.parametrize("negotiate", [False, True])
@pytest.mark.parametrize(("role", "nested"), ENDS)
@settings(max_examples=150, deadline=None)
@given(stream=anything)
def test_random_bytes_raise_nothing_but_protocol_errors(
    role: Role, nested: bool, negotiate: bool, stream: list[Piece]
) -> None:
    feed(opened(role, nested, negotiate), stream)


@st.composite
def mutated(draw: st.DrawFn, vectors: tuple[Vector, ...], flags: int) -> list[Piece]:
    """Valid messages of which bytes were changed, cut out, put in, or taken twice, and descriptors lost or added."""
    stream: list[Piece] = []
    for vector in draw(st.lists(st.sampled_from(vectors), min_size=1, max_size=8)):
        payload = vector.reply_data if flags & 4 and vector.reply is not None else vector.data
        data, fds = bytearray(wire(vector.request, payload, flags | draw(st.sampled_from([0, 8])))), vector.fds
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(data)))
            match draw(st.sampled_from(["change", "cut", "insert", "fds"])):
                case "change" if at < len(data):
                    data[at] = draw(st.integers(0, 255))
                case "cut":
                    del data[at : at + draw(st.integers(1, 8))]
                case "insert":
                    data[at:at] = draw(st.binary(max_size=8))
                case "fds":
                    fds = draw(some_fds)
        stream.append((bytes(data) or b"\0", fds))
    return stream


@pytest.mark.parametrize("negotiate", [False, True])
@pytest.mark.parametrize(("role", "nested"), ENDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_streams_raise_nothing_but_protocol_errors(
    role: Role, nested: bool, negotiate: bool, data: st.DataObject
) -> None:
    connection = opened(role, nested, negotiate)
    asks = (role is Role.FRONTEND) is not nested
    feed(connection, data.draw(mutated(BACKEND_VECTORS if nested else FRONTEND_VECTORS, 4 if asks else 0)))


numbers = st.integers(-2, 1 << 65) | st.integers(0, 300)
regions = st.builds(MemoryRegion, numbers, numbers, numbers, numbers)
payloads = st.one_of(
    st.builds(Nothing),
    st.builds(U64, numbers),
    st.builds(VringState, numbers, numbers),
    st.builds(VringFd, numbers),
    st.builds(VringAddr, numbers, numbers, numbers, numbers, numbers, numbers),
    st.builds(MemoryTable, st.lists(regions, max_size=130).map(tuple)),
    st.builds(SingleRegion, regions),
    st.builds(Config, numbers, numbers, numbers, st.binary(max_size=20)),
    st.builds(Inflight, numbers, numbers, numbers, numbers),
    st.builds(ShmemConfig, numbers, st.lists(numbers, max_size=3).map(tuple)),
    st.builds(Raw, st.binary(max_size=20)),
    st.sampled_from([vector.payload for vector in FRONTEND_VECTORS + BACKEND_VECTORS]),
)
messages = st.builds(
    Message[str],
    st.sampled_from([*FrontendRequest, *BackendRequest]) | st.integers(-1, 60) | numbers,
    payloads,
    some_fds,
    st.booleans(),
)


@pytest.mark.parametrize(("role", "nested"), ENDS)
@settings(max_examples=150, deadline=None)
@given(sent=st.lists(messages, max_size=8))
def test_sending_anything_raises_nothing_but_local_protocol_errors(
    role: Role, nested: bool, sent: list[Message[str]]
) -> None:
    connection = opened(role, nested, negotiate=False)
    for message in sent:
        try:
            data, fds = connection.send(message)
        except LocalProtocolError:
            continue
        assert fds == message.fds
        assert len(data) >= 12


@settings(max_examples=150, deadline=None)
@given(sent=st.lists(messages, max_size=8))
def test_what_could_be_sent_is_never_refused(sent: list[Message[str]]) -> None:
    pair = negotiated(USUAL)
    for message in sent:
        try:
            data, fds = pair.frontend.send(message)
        except LocalProtocolError:
            continue
        event = pair.push(data, fds)
        assert event == message
        if not isinstance(event, Message) or not settle(pair.backend, event):
            return
        if pair.frontend.awaits_reply:
            return
