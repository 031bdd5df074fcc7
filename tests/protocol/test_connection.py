"""Pair: every message across two connections, replies and acknowledgements, negotiation seen passing by."""

from __future__ import annotations

import pytest
from tests.protocol.pairs import ALL, EVERY_BIT, NEED_REPLY, USUAL, Pair, negotiated, wire
from tests.protocol.vectors import BACKEND_VECTORS, FRONTEND_VECTORS, R0, R1, Vector, proving

from vhostuser.errors import LocalProtocolError, RemoteProtocolError
from vhostuser.protocol import (
    U64,
    BackendRequest,
    Config,
    Connection,
    DeviceStateReply,
    FrontendRequest,
    Inflight,
    Log,
    MemoryTable,
    Message,
    Nothing,
    Payload,
    ProtocolFeature,
    Raw,
    Refused,
    Reply,
    Role,
    SingleRegion,
    VringFd,
    VringState,
    XenMemoryRegion,
    XenMemoryTable,
    XenSingleRegion,
)

Req = FrontendRequest


def prepared(vector: Vector) -> Pair:
    """A pair on which the message of ``vector`` may be sent."""
    if isinstance(vector.request, BackendRequest):
        return Pair(negotiated())
    return negotiated()


@pytest.mark.parametrize("vector", proving(FRONTEND_VECTORS + BACKEND_VECTORS))
def test_what_one_end_sends_the_other_reports(vector: Vector) -> None:
    pair = prepared(vector)
    sent = Message(vector.request, vector.payload, vector.fds)
    assert pair.asker.send(sent) == (wire(vector.request, vector.data), vector.fds)
    event = pair.push(wire(vector.request, vector.data), vector.fds)
    assert event == sent
    assert type(event) is Message
    assert type(event.request) is type(vector.request)
    if vector.reply is None:
        assert pair.asked.acknowledge(event) is None
        return
    answer = pair.asked.answer(event, vector.reply, vector.reply_fds)
    assert answer == (wire(vector.request, vector.reply_data, 0x4), vector.reply_fds)
    pair.asker.receive(*answer)
    assert pair.asker.next_event() == Reply(vector.request, vector.reply, vector.reply_fds)
    assert not pair.asker.awaits_reply


@pytest.mark.parametrize("vector", FRONTEND_VECTORS + BACKEND_VECTORS, ids=lambda vector: repr(vector.request))
def test_a_message_is_answered_exactly_once_when_it_asks_for_it(vector: Vector) -> None:
    pair = prepared(vector)
    message = pair.ask(Message(vector.request, vector.payload, vector.fds, need_reply=True))
    assert message.need_reply
    if vector.reply is not None:
        with pytest.raises(LocalProtocolError):
            pair.asked.acknowledge(message)
        assert not pair.answer(message, vector.reply, vector.reply_fds).ack
    else:
        with pytest.raises(LocalProtocolError):
            pair.asked.answer(message, Nothing())
        assert pair.acknowledge(message, 22) == Reply(vector.request, U64(22), ack=True)
    assert pair.asked.acknowledge(message) is None


def test_without_reply_ack_need_reply_is_ignored_and_not_sent() -> None:
    pair = negotiated(USUAL & ~ProtocolFeature.REPLY_ACK & ~ProtocolFeature.INBAND_NOTIFICATIONS)
    with pytest.raises(LocalProtocolError, match="REPLY_ACK"):
        pair.frontend.send(Message(Req.SET_OWNER, need_reply=True))
    event = pair.push(wire(Req.SET_OWNER, flags=NEED_REPLY))
    assert event == Message(Req.SET_OWNER, need_reply=True)
    assert isinstance(event, Message)
    assert pair.backend.acknowledge(event) is None


def test_need_reply_on_the_message_that_negotiates_it_is_honoured() -> None:
    pair = negotiated(ProtocolFeature(0))
    message = pair.ask(Message(Req.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK), need_reply=True))
    assert pair.acknowledge(message) == Reply(Req.SET_PROTOCOL_FEATURES, U64(0), ack=True)


def test_need_reply_on_the_message_that_drops_it_is_not_honoured() -> None:
    pair = negotiated()
    event = pair.push(wire(Req.SET_PROTOCOL_FEATURES, bytes(8), NEED_REPLY))
    assert isinstance(event, Message)
    assert pair.backend.acknowledge(event) is None


def test_both_ends_see_the_negotiation_pass() -> None:
    pair = Pair()
    assert pair.backend.features_offered is None
    assert pair.backend.protocol_features_offered is None
    pair.answer(pair.ask(Message(Req.GET_FEATURES)), U64(1 << 30 | 1 << 32))
    pair.answer(pair.ask(Message(Req.GET_PROTOCOL_FEATURES)), U64(0x209))
    pair.ask(Message(Req.SET_PROTOCOL_FEATURES, U64(0x200)))
    pair.ask(Message(Req.SET_FEATURES, U64(1 << 32)))
    for end in (pair.frontend, pair.backend):
        assert end.features_offered == 1 << 30 | 1 << 32
        assert end.protocol_features_offered == ProtocolFeature(0x209)
        assert end.features == 1 << 32
        assert end.protocol_features == ProtocolFeature.CONFIG


def test_features_may_be_set_before_protocol_features() -> None:
    pair = Pair()
    pair.answer(pair.ask(Message(Req.GET_FEATURES)), U64(EVERY_BIT))
    pair.ask(Message(Req.SET_FEATURES, U64(1 << 30)))
    pair.ask(Message(Req.SET_PROTOCOL_FEATURES, U64(0x209)))
    assert pair.backend.protocol_features == ProtocolFeature(0x209)


def test_a_channel_follows_the_negotiation_of_its_main_connection() -> None:
    main = negotiated(ProtocolFeature(0))
    channel = Pair(main)
    with pytest.raises(LocalProtocolError, match="CONFIG is not negotiated"):
        channel.backend.send(Message(BackendRequest.CONFIG_CHANGE_MSG))
    main.ask(Message(Req.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ)))
    channel.ask(Message(BackendRequest.CONFIG_CHANGE_MSG))


def test_messages_of_the_channel_are_not_taken_for_those_of_the_main_connection() -> None:
    main = negotiated()
    channel = Pair(main)
    for vector in BACKEND_VECTORS:
        message = channel.ask(Message(vector.request, vector.payload, vector.fds, need_reply=True))
        if vector.reply is None:
            channel.acknowledge(message, 1)
        else:
            channel.answer(message, vector.reply, vector.reply_fds)
    for end in (main.frontend, main.backend):
        assert end.features_offered == EVERY_BIT
        assert end.features == EVERY_BIT
        assert end.protocol_features == USUAL


def test_a_channel_without_a_main_connection_allows_everything() -> None:
    backend: Connection[str] = Connection(Role.BACKEND, nested=True)
    for vector in BACKEND_VECTORS:
        data, _ = backend.send(Message(vector.request, vector.payload, vector.fds))
        assert data == wire(vector.request, vector.data)
        if vector.reply is not None:
            backend.receive(wire(vector.request, vector.reply_data, 0x4))
            assert isinstance(backend.next_event(), Reply)


def test_descriptors_on_the_channel_need_their_own_feature() -> None:
    main = negotiated(USUAL & ~ProtocolFeature.BACKEND_SEND_FD & ~ProtocolFeature.SHMEM)
    channel = Pair(main)
    notifier = BACKEND_VECTORS[2]
    with pytest.raises(LocalProtocolError, match="BACKEND_SEND_FD"):
        channel.backend.send(Message(notifier.request, notifier.payload, ("page",)))
    assert isinstance(channel.push(wire(notifier.request, notifier.data), ("page",)), Refused)
    assert channel.frontend.refused_fds() == ("page",)


def test_one_answer_at_a_time_is_awaited_and_silent_messages_may_follow() -> None:
    pair = negotiated()
    pair.frontend.send(Message(Req.GET_QUEUE_NUM))
    assert pair.frontend.awaits_reply
    pair.frontend.send(Message(Req.SET_OWNER))
    for message in (Message[str](Req.GET_FEATURES), Message[str](Req.SET_OWNER, need_reply=True)):
        with pytest.raises(LocalProtocolError, match="GET_QUEUE_NUM is not answered yet"):
            pair.frontend.send(message)


def test_the_next_message_waits_for_the_answer_to_the_last() -> None:
    pair = negotiated()
    pair.backend.receive(wire(Req.GET_QUEUE_NUM) + wire(Req.SET_OWNER))
    message = pair.backend.next_event()
    assert isinstance(message, Message)
    with pytest.raises(LocalProtocolError, match="GET_QUEUE_NUM has to be answered"):
        pair.backend.next_event()
    with pytest.raises(LocalProtocolError, match="before SET_OWNER"):
        pair.backend.acknowledge(Message(Req.SET_OWNER))
    pair.backend.answer(message, U64(1))
    assert pair.backend.next_event() == Message(Req.SET_OWNER)


@pytest.mark.parametrize(
    ("request_", "payload", "form"),
    [
        (Req.GET_CONFIG, Config(0, 4, 0, bytes(4)), Config(0, 0, 0, b"")),
        (Req.GET_INFLIGHT_FD, Inflight(0, 0, 1, 1), Inflight(0, 0, 0, 0)),
        (Req.CHECK_DEVICE_STATE, Nothing(), U64(1)),
        (Req.POSTCOPY_END, Nothing(), U64(1)),
        (Req.POSTCOPY_ADVISE, Nothing(), Nothing()),
    ],
)
def test_failures_of_own_replies_have_their_own_form(
    request_: FrontendRequest, payload: Payload, form: Payload
) -> None:
    pair = negotiated()
    assert pair.acknowledge(pair.ask(Message(request_, payload)), 1) == Reply(request_, form)


def test_a_failure_without_a_form_leaves_only_closing() -> None:
    pair = negotiated()
    message = pair.ask(Message(Req.GET_VRING_BASE, VringState(9, 0), need_reply=True))
    assert pair.backend.acknowledge(message, 1) is None


def test_the_state_descriptor_s_failure_is_in_the_low_byte() -> None:
    vector = FRONTEND_VECTORS[Req.SET_DEVICE_STATE_FD - 1]
    pair = negotiated()
    reply = pair.acknowledge(pair.ask(Message(vector.request, vector.payload, vector.fds)), 1)
    assert reply == Reply(vector.request, DeviceStateReply(0x101))


def test_a_config_reply_is_as_long_as_its_request() -> None:
    pair = negotiated()
    request = Config(0, 8, 0, bytes(8)).pack().ljust(268, b"\0")
    event = pair.push(wire(Req.GET_CONFIG, request))
    assert event == Message(Req.GET_CONFIG, Config(0, 8, 0, bytes(8)))
    assert isinstance(event, Message)
    data, _ = pair.backend.answer(event, Config(0, 8, 0, b"12345678"))
    assert data == wire(Req.GET_CONFIG, Config(0, 8, 0, b"12345678").pack().ljust(268, b"\0"), 0x4)


@pytest.mark.parametrize("reply", [Config(0, 4, 0, b"1234"), Config(0, 9, 0, b"123456789"), U64(0), Nothing()])
def test_another_config_reply_than_asked_for_is_not_sent(reply: Payload) -> None:
    pair = negotiated()
    message = pair.ask(Message(Req.GET_CONFIG, Config(0, 8, 0, bytes(8))))
    with pytest.raises(LocalProtocolError, match="reply to GET_CONFIG"):
        pair.backend.answer(message, reply)
    assert pair.answer(message, Config(0, 8, 0, bytes(8)))


@pytest.mark.parametrize("dialect", [b"", bytes(12)])
def test_both_dialects_of_a_failed_config_read_are_understood(dialect: bytes) -> None:
    pair = negotiated()
    pair.frontend.send(Message(Req.GET_CONFIG, Config(0, 4, 0, bytes(4))))
    pair.frontend.receive(wire(Req.GET_CONFIG, dialect, 0x4))
    assert pair.frontend.next_event() == Reply(Req.GET_CONFIG, Config(0, 0, 0, b""))


@pytest.mark.parametrize("size", [4, 256])
def test_a_config_reply_with_room_for_256_bytes_is_cut_to_what_was_asked(size: int) -> None:
    pair = negotiated()
    pair.frontend.send(Message(Req.GET_CONFIG, Config(0, 4, 0, bytes(4))))
    pair.frontend.receive(wire(Req.GET_CONFIG, Config.HEAD.pack(0, size, 0) + b"1234".ljust(256, b"\0"), 0x4))
    assert pair.frontend.next_event() == Reply(Req.GET_CONFIG, Config(0, 4, 0, b"1234"))


@pytest.mark.parametrize(("size", "room"), [(3, 4), (3, 256), (5, 256), (4, 8), (5, 5), (8, 8), (255, 255)])
def test_any_other_size_of_a_config_reply_ends_the_connection(size: int, room: int) -> None:
    pair = negotiated()
    pair.frontend.send(Message(Req.GET_CONFIG, Config(0, 4, 0, bytes(4))))
    pair.frontend.receive(wire(Req.GET_CONFIG, Config.HEAD.pack(0, size, 0) + bytes(room), 0x4))
    with pytest.raises(RemoteProtocolError, match="GET_CONFIG"):
        pair.frontend.next_event()


@pytest.mark.parametrize("answer", [b"", bytes(8), Log(0x1000, 0).pack(), bytes(24)])
def test_any_size_answers_the_log_base(answer: bytes) -> None:
    pair = negotiated()
    pair.frontend.send(Message(Req.SET_LOG_BASE, Log(0x1000, 0), ("log",)))
    pair.frontend.receive(wire(Req.SET_LOG_BASE, answer, 0x4))
    expected: Payload = Log(0x1000, 0) if len(answer) == 16 and any(answer) else Raw(answer)
    assert pair.frontend.next_event() == Reply(Req.SET_LOG_BASE, expected)


def test_without_its_feature_the_log_base_is_an_address_and_has_no_reply() -> None:
    pair = negotiated(USUAL & ~ProtocolFeature.LOG_SHMFD)
    message = pair.ask(Message(Req.SET_LOG_BASE, U64(0x1000)))
    assert message.payload == U64(0x1000)
    assert pair.backend.acknowledge(message) is None


def test_with_xen_mmap_regions_have_their_longer_form() -> None:
    region = XenMemoryRegion(0, 0x1000, 0, 0, 1, 3)
    pair = negotiated(ALL)
    assert pair.ask(Message(Req.SET_MEM_TABLE, XenMemoryTable((region,)), ("a",))).payload == XenMemoryTable((region,))
    assert pair.ask(Message(Req.ADD_MEM_REG, XenSingleRegion(region), ("a",))).payload == XenSingleRegion(region)
    assert pair.ask(Message(Req.REM_MEM_REG, XenSingleRegion(region))).payload == XenSingleRegion(region)
    with pytest.raises(LocalProtocolError, match="carries XenMemoryTable"):
        pair.frontend.send(Message(Req.SET_MEM_TABLE, MemoryTable((R0,)), ("a",)))


def test_postcopy_gives_memory_messages_a_reply_and_a_last_word() -> None:
    pair = negotiated()
    pair.ask(Message(Req.POSTCOPY_LISTEN))
    table = pair.ask(Message(Req.SET_MEM_TABLE, MemoryTable((R0, R1)), ("a", "b")))
    assert pair.answer(table, MemoryTable((R1, R0))).payload == MemoryTable((R1, R0))
    assert pair.backend.acknowledge(pair.ask(Message(Req.SET_MEM_TABLE, U64(0)))) is None
    region = pair.ask(Message(Req.ADD_MEM_REG, SingleRegion(R1), ("c",)))
    assert pair.answer(region, SingleRegion(R0)).payload == SingleRegion(R0)
    assert pair.backend.acknowledge(pair.ask(Message(Req.ADD_MEM_REG, U64(0)))) is None
    pair.answer(pair.ask(Message(Req.POSTCOPY_END)), U64(0))
    after = pair.ask(Message(Req.SET_MEM_TABLE, MemoryTable((R0,)), ("a",)))
    assert pair.backend.acknowledge(after) is None


def test_an_unknown_request_is_passed_on_with_everything() -> None:
    pair = negotiated()
    event = pair.push(wire(1005, b"abc", NEED_REPLY), ("x", "y"))
    assert event == Message(1005, Raw(b"abc"), ("x", "y"), need_reply=True)
    assert isinstance(event, Message)
    assert pair.backend.acknowledge(event, 1) == (wire(1005, U64(1).pack(), 0x4), ())


def test_an_unknown_request_can_be_sent_and_acknowledged() -> None:
    pair = negotiated()
    message = pair.ask(Message(46, Raw(b"new"), need_reply=True))
    assert pair.acknowledge(message, 1) == Reply(46, U64(1), ack=True)


@pytest.mark.parametrize("tail", [b"", wire(Req.SET_OWNER)[:11]])
def test_the_end_of_the_stream_closes_the_connection(tail: bytes) -> None:
    pair = negotiated()
    pair.backend.receive(wire(Req.SET_VRING_CALL, VringFd.of(1).pack()), ("call",))
    pair.backend.receive(b"")
    assert pair.backend.want == 0
    assert pair.backend.next_event() == Message(Req.SET_VRING_CALL, VringFd(1), ("call",))
    assert not pair.backend.closed
    assert pair.backend.next_event() is None
    assert pair.backend.closed
    pair.backend.receive(tail, ("late",))
    assert pair.backend.next_event() is None
    assert pair.backend.refused_fds() == ("late",)
    pair.frontend.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        pair.frontend.send(Message(Req.SET_OWNER))


def test_closing_hands_back_what_nobody_took() -> None:
    pair = negotiated()
    pair.backend.receive(wire(Req.SET_VRING_CALL, VringFd.of(1).pack()), ("whole",))
    pair.backend.receive(wire(Req.SET_VRING_CALL)[:3], ("begun",))
    pair.backend.close()
    assert sorted(pair.backend.refused_fds()) == ["begun", "whole"]
    assert pair.backend.refused_fds() == ()
    assert pair.backend.want == 0
