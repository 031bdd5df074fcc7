"""What is refused, what is fatal and what peers are forgiven; for the sender the same rules are strict."""

from __future__ import annotations

import pytest
from tests.protocol.pairs import EVERY_BIT, NEED_REPLY, REPLY, USUAL, Pair, negotiated, wire
from tests.protocol.vectors import BACKEND_VECTORS, FRONTEND_VECTORS, R0, R1, REGION_1, Vector

from vhostuser.errors import LocalProtocolError, RemoteProtocolError
from vhostuser.protocol import (
    BACKEND_RULES,
    FRONTEND_RULES,
    MAX_FDS,
    MAX_PAYLOAD,
    REQUIRED_WITH,
    U64,
    BackendRequest,
    Config,
    DeviceStateReply,
    Fds,
    FrontendRequest,
    Inflight,
    Iotlb,
    MemoryTable,
    Message,
    Nothing,
    Payload,
    ProtocolFeature,
    Raw,
    Refused,
    Reply,
    Role,
    SharedObject,
    VringAddr,
    VringFd,
    VringState,
)
from vhostuser.protocol.connection import Connection
from vhostuser.virtio.blk import BlkFeature

Req = FrontendRequest
ALL_VECTORS = FRONTEND_VECTORS + BACKEND_VECTORS


def test_every_message_has_a_rule() -> None:
    assert list(FRONTEND_RULES) == list(FrontendRequest)
    assert list(BACKEND_RULES) == list(BackendRequest)


def gated() -> list[tuple[Vector, ProtocolFeature]]:
    rules = {**{v.request: FRONTEND_RULES[Req(v.request)] for v in FRONTEND_VECTORS}}
    main = [(v, rules[v.request].needs) for v in FRONTEND_VECTORS if rules[v.request].needs]
    return main + [(v, BACKEND_RULES[BackendRequest(v.request)].needs) for v in BACKEND_VECTORS]


@pytest.mark.parametrize(("vector", "needs"), gated(), ids=lambda value: repr(getattr(value, "request", value)))
def test_a_message_without_its_feature_is_refused_by_both_ends(vector: Vector, needs: ProtocolFeature) -> None:
    if vector.request is BackendRequest.IOTLB_MSG:
        main = negotiated(features=EVERY_BIT & ~(1 << 33))
    else:
        dependants = [feature for feature, others in REQUIRED_WITH.items() if others & needs]
        main = negotiated(USUAL & ~needs & ~sum(dependants, start=ProtocolFeature(0)))
    pair = Pair(main) if isinstance(vector.request, BackendRequest) else main
    with pytest.raises(LocalProtocolError, match="is not negotiated"):
        pair.asker.send(Message(vector.request, vector.payload, vector.fds))
    event = pair.push(wire(vector.request, vector.data), vector.fds)
    if vector.request is Req.GET_QUEUE_NUM:  # SPDK
        assert event == Message(Req.GET_QUEUE_NUM)
        return
    assert isinstance(event, Refused)
    assert "is not negotiated" in event.reason
    assert pair.asked.refused_fds() == vector.fds


def test_the_iotlb_needs_access_platform() -> None:
    pair = negotiated(features=EVERY_BIT & ~(1 << 33))
    vector = FRONTEND_VECTORS[Req.IOTLB_MSG - 1]
    with pytest.raises(LocalProtocolError, match="bit 33 is not negotiated"):
        pair.frontend.send(Message(vector.request, vector.payload))
    event = pair.push(wire(vector.request, vector.data))
    assert isinstance(event, Refused)
    assert pair.backend.acknowledge(event, 1) == (wire(Req.IOTLB_MSG, U64(1).pack(), REPLY), ())


@pytest.mark.parametrize("request_", [Req.GET_PROTOCOL_FEATURES, Req.SET_PROTOCOL_FEATURES])
def test_protocol_features_need_bit_30_offered(request_: FrontendRequest) -> None:
    pair = Pair()
    pair.answer(pair.ask(Message(Req.GET_FEATURES)), U64(1 << 32))
    payload = bytes(8) if request_ is Req.SET_PROTOCOL_FEATURES else b""
    with pytest.raises(LocalProtocolError, match="PROTOCOL_FEATURES is not offered"):
        pair.frontend.send(Message(request_, U64(0) if payload else Nothing()))
    assert isinstance(pair.push(wire(request_, payload)), Refused)


def test_a_front_end_that_reconnects_may_set_what_it_learned_before() -> None:
    pair = Pair()
    assert pair.push(wire(Req.SET_PROTOCOL_FEATURES, U64(0x209).pack())) == Message(
        Req.SET_PROTOCOL_FEATURES, U64(0x209)
    )
    assert pair.push(wire(Req.SET_FEATURES, U64(1 << 30).pack())) == Message(Req.SET_FEATURES, U64(1 << 30))
    with pytest.raises(LocalProtocolError, match="is not offered"):
        Pair().frontend.send(Message(Req.GET_PROTOCOL_FEATURES))


@pytest.mark.parametrize("enable", [0, 1])
def test_enable_is_taken_before_bit_30_is_acked_but_not_sent(enable: int) -> None:
    pair = negotiated(features=0)
    message: Message[str] = Message(Req.SET_VRING_ENABLE, VringState(0, enable))
    with pytest.raises(LocalProtocolError, match="PROTOCOL_FEATURES is not negotiated"):
        pair.frontend.send(message)
    assert pair.push(wire(Req.SET_VRING_ENABLE, VringState(0, enable).pack())) == message


def test_features_that_were_not_offered_are_refused() -> None:
    pair = Pair()
    pair.answer(pair.ask(Message(Req.GET_FEATURES)), U64(1 << 30))
    pair.answer(pair.ask(Message(Req.GET_PROTOCOL_FEATURES)), U64(1))
    for request, value in ((Req.SET_FEATURES, 1 << 5), (Req.SET_PROTOCOL_FEATURES, 1 << 9)):
        with pytest.raises(LocalProtocolError, match="was not offered"):
            pair.frontend.send(Message(request, U64(value)))
        event = pair.push(wire(request, U64(value).pack()))
        assert isinstance(event, Refused)
        assert "was not offered" in event.reason
    assert pair.backend.features == 0
    assert pair.backend.protocol_features == ProtocolFeature(0)


@pytest.mark.parametrize(("request_", "bit"), [(Req.SET_FEATURES, 34), (Req.SET_PROTOCOL_FEATURES, 40)])
def test_bits_without_a_name_are_refused_like_any_other_that_was_not_offered(
    request_: FrontendRequest, bit: int
) -> None:
    """Offers are flags of an enumeration, whose inverse knows none but its own bits."""
    pair = Pair()
    pair.backend.offer(BlkFeature.FLUSH | 1 << 30, ProtocolFeature.MQ)
    event = pair.push(wire(request_, U64(1 << bit).pack()))
    assert isinstance(event, Refused)
    assert "was not offered" in event.reason


def test_in_band_notifications_without_what_they_need_end_the_connection() -> None:
    pair = negotiated()
    with pytest.raises(LocalProtocolError, match="INBAND_NOTIFICATIONS needs BACKEND_REQ"):
        pair.frontend.send(Message(Req.SET_PROTOCOL_FEATURES, U64(1 << 14 | 1 << 3)))
    with pytest.raises(RemoteProtocolError, match="INBAND_NOTIFICATIONS needs REPLY_ACK"):
        pair.push(wire(Req.SET_PROTOCOL_FEATURES, U64(1 << 14 | 1 << 5).pack()))
    assert pair.backend.closed


BAD_VALUES: list[tuple[FrontendRequest, Payload]] = [
    (Req.SET_VRING_NUM, VringState(0, 0)),
    (Req.SET_VRING_NUM, VringState(0, 32769)),
    (Req.SET_VRING_ENABLE, VringState(0, 2)),
    (Req.SET_VRING_ENDIAN, VringState(0, 2)),
    (Req.SET_VRING_ADDR, VringAddr(0, 2, 0, 0, 0, 0)),
    (Req.SET_STATUS, U64(256)),
    (Req.IOTLB_MSG, Iotlb(0, 0, 0, 0, 1)),
    (Req.IOTLB_MSG, Iotlb(0, 0, 0, 4, 2)),
]


@pytest.mark.parametrize(("request_", "payload"), BAD_VALUES, ids=repr)
def test_a_value_that_a_field_may_not_have_is_refused_and_nacked(request_: FrontendRequest, payload: Payload) -> None:
    pair = negotiated()
    with pytest.raises(LocalProtocolError, match="may not be"):
        pair.frontend.send(Message(request_, payload))
    event = pair.push(wire(request_, payload.pack(), NEED_REPLY))
    assert isinstance(event, Refused)
    assert event.need_reply
    assert pair.backend.acknowledge(event, 1) == (wire(request_, U64(1).pack(), REPLY), ())
    assert pair.push(wire(Req.SET_OWNER)) == Message(Req.SET_OWNER)


WITH_SIZE = [v for v in ALL_VECTORS if v.wire != "c0ffee"]


@pytest.mark.parametrize("vector", WITH_SIZE, ids=lambda vector: repr(vector.request))
def test_a_payload_of_the_wrong_size_is_refused_and_its_descriptors_handed_back(vector: Vector) -> None:
    main = negotiated()
    pair = Pair(main) if isinstance(vector.request, BackendRequest) else main
    wrong = vector.data[:-8] if vector.data else b"tail"
    if vector.request is Req.SET_CONFIG:
        wrong = vector.data[:-1]
    if isinstance(vector.payload, SharedObject) or vector.request is Req.SET_OWNER:
        wrong = b"tail"
    event = pair.push(wire(vector.request, wrong), vector.fds)
    assert isinstance(event, Refused)
    assert event.size == len(wrong)
    assert pair.asked.refused_fds() == vector.fds
    assert not pair.asked.closed


@pytest.mark.parametrize("vector", [v for v in ALL_VECTORS if not v.fds], ids=lambda vector: repr(vector.request))
def test_a_surplus_descriptor_is_refused_except_where_peers_attach_one(vector: Vector) -> None:
    main = negotiated()
    pair = Pair(main) if isinstance(vector.request, BackendRequest) else main
    with pytest.raises(LocalProtocolError, match="descriptors"):
        pair.asker.send(Message(vector.request, vector.payload, ("surplus",)))
    event = pair.push(wire(vector.request, vector.data), ("surplus",))
    if (
        vector.request in (Req.REM_MEM_REG, Req.SET_VRING_CALL) and pair is main
    ):  # libblkio; no-fd bit and one all the same
        assert event == Message(vector.request, vector.payload)
    else:
        assert isinstance(event, Refused)
    assert pair.asked.refused_fds() == ("surplus",)


@pytest.mark.parametrize("vector", [v for v in ALL_VECTORS if v.fds], ids=lambda vector: repr(vector.request))
def test_a_missing_descriptor_or_one_too_many_is_refused(vector: Vector) -> None:
    main = negotiated()
    pair = Pair(main) if isinstance(vector.request, BackendRequest) else main
    for fds in (vector.fds[:-1], (*vector.fds, "surplus")):
        with pytest.raises(LocalProtocolError, match="descriptors"):
            pair.asker.send(Message(vector.request, vector.payload, fds))
        event = pair.push(wire(vector.request, vector.data, NEED_REPLY), fds)
        assert isinstance(event, Refused)
        assert "descriptors" in event.reason
        assert pair.asked.refused_fds() == fds
        if vector.request is Req.SET_LOG_BASE:  # its own reply cannot say that it failed
            assert pair.asked.acknowledge(event, 1) is None
            return
        assert pair.asked.acknowledge(event, 1) is not None


def test_a_refused_message_without_need_reply_cannot_be_nacked() -> None:
    pair = negotiated()
    event = pair.push(wire(Req.SET_VRING_NUM, b"short"))
    assert isinstance(event, Refused)
    assert pair.backend.acknowledge(event, 1) is None


def test_forgiven_payloads_are_understood() -> None:
    pair = negotiated()
    uml_table = bytes.fromhex(f"01000000 00000000 {REGION_1}") + bytes(32)
    assert pair.push(wire(Req.SET_MEM_TABLE, uml_table), ("a",)) == Message(
        Req.SET_MEM_TABLE, MemoryTable((R1,)), ("a",)
    )
    spdk_config = Config(32, 1, 0, b"\1").pack().ljust(268, b"\0")
    assert pair.push(wire(Req.SET_CONFIG, spdk_config)) == Message(Req.SET_CONFIG, Config(32, 1, 0, b"\1"))
    short = Inflight(4096, 0, 1, 128).pack()[:20]
    expected = Message(Req.SET_INFLIGHT_FD, Inflight(4096, 0, 1, 128), ("r",))
    assert pair.push(wire(Req.SET_INFLIGHT_FD, short), ("r",)) == expected
    for _ in range(2):
        assert pair.push(wire(Req.SET_OWNER)) == Message(Req.SET_OWNER)
    assert pair.push(wire(Req.SET_MEM_TABLE, bytes(8))) == Message(Req.SET_MEM_TABLE, MemoryTable(()))
    qemu_uuid = pair.push(wire(Req.GET_SHARED_OBJECT))
    assert qemu_uuid == Message(Req.GET_SHARED_OBJECT, Nothing())
    assert isinstance(qemu_uuid, Message)
    assert pair.backend.answer(qemu_uuid, Nothing()) == (wire(Req.GET_SHARED_OBJECT, flags=REPLY), ())


def test_thirty_two_descriptors_are_taken_and_more_end_the_connection() -> None:
    table = MemoryTable((R0,) * MAX_FDS)
    fds = tuple(str(number) for number in range(MAX_FDS))
    pair = negotiated()
    assert pair.push(wire(Req.SET_MEM_TABLE, table.pack()), fds) == Message(Req.SET_MEM_TABLE, table, fds)
    with pytest.raises(RemoteProtocolError, match="33 descriptors"):
        pair.push(wire(Req.SET_OWNER), (*fds, "32"))
    assert pair.backend.refused_fds() == (*fds, "32")


FATAL = {
    "version 0": wire(Req.SET_OWNER, version=0),
    "version 2": wire(Req.SET_OWNER, version=2),
    "a reserved flag": wire(Req.SET_OWNER, flags=0x10),
    "a reply": wire(Req.SET_OWNER, flags=REPLY),
    "oversize": wire(Req.SET_OWNER, bytes(MAX_PAYLOAD + 1)),
    "cut off": wire(Req.SET_VRING_NUM, bytes(8))[:-1],
}


@pytest.mark.parametrize("kind", FATAL)
def test_broken_framing_ends_the_connection_after_the_good_messages(kind: str) -> None:
    pair = negotiated()
    pair.backend.receive(wire(Req.SET_OWNER) + FATAL[kind])
    pair.backend.receive(b"")
    assert pair.backend.next_event() == Message(Req.SET_OWNER)
    with pytest.raises(RemoteProtocolError):
        pair.backend.next_event()
    assert pair.backend.closed
    assert pair.backend.want == 0
    assert pair.backend.next_event() is None


def test_the_largest_payload_is_taken() -> None:
    assert negotiated().push(wire(1005, bytes(MAX_PAYLOAD))) == Message(1005, Raw(bytes(MAX_PAYLOAD)))


def test_descriptors_in_the_middle_of_a_message_end_the_connection() -> None:
    pair = negotiated()
    pair.backend.receive(wire(Req.SET_OWNER)[:5], ())
    pair.backend.receive(wire(Req.SET_OWNER)[5:], ("late",))
    assert pair.backend.next_event() == Message(Req.SET_OWNER)
    with pytest.raises(RemoteProtocolError, match="in the middle"):
        pair.backend.next_event()
    assert pair.backend.refused_fds() == ("late",)


BAD_REPLIES = {
    "a request": wire(Req.GET_QUEUE_NUM, bytes(8)),
    "need_reply in a reply": wire(Req.GET_QUEUE_NUM, bytes(8), REPLY | NEED_REPLY),
    "another request's": wire(Req.GET_FEATURES, bytes(8), REPLY),
    "too short": wire(Req.GET_QUEUE_NUM, bytes(7), REPLY),
    "too long": wire(Req.GET_QUEUE_NUM, bytes(9), REPLY),
}


@pytest.mark.parametrize("fds", [(), ("fd",)])
@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_wrong_reply_ends_the_connection(kind: str, fds: tuple[str, ...]) -> None:
    pair = negotiated()
    pair.frontend.send(Message(Req.GET_QUEUE_NUM))
    pair.frontend.receive(BAD_REPLIES[kind], fds)
    with pytest.raises(RemoteProtocolError):
        pair.frontend.next_event()
    assert pair.frontend.refused_fds() == fds
    assert pair.frontend.closed


def test_a_right_reply_with_a_descriptor_too_many_ends_the_connection() -> None:
    pair = negotiated()
    pair.frontend.send(Message(Req.GET_QUEUE_NUM))
    pair.frontend.receive(wire(Req.GET_QUEUE_NUM, bytes(8), REPLY), ("fd",))
    with pytest.raises(RemoteProtocolError, match="1 descriptors came where 0 belong"):
        pair.frontend.next_event()
    assert pair.frontend.refused_fds() == ("fd",)


def test_a_reply_that_nothing_asked_for_ends_the_connection() -> None:
    pair = negotiated()
    pair.frontend.receive(wire(Req.SET_OWNER, bytes(8), REPLY))
    with pytest.raises(RemoteProtocolError, match="nothing asked for"):
        pair.frontend.next_event()


@pytest.mark.parametrize("reply", [Config(0, 5, 0, bytes(5)), Config(1, 4, 0, bytes(4)), Config(0, 4, 0, bytes(4))])
def test_a_config_reply_for_another_range_ends_the_connection(reply: Config) -> None:
    pair = negotiated()
    pair.frontend.send(Message(Req.GET_CONFIG, Config(0, 4, 0, bytes(4))))
    pair.frontend.receive(wire(Req.GET_CONFIG, reply.pack(), REPLY))
    if reply.offset == 0 and reply.size == 4:
        assert pair.frontend.next_event() == Reply(Req.GET_CONFIG, reply)
    else:
        with pytest.raises(RemoteProtocolError, match="asked for"):
            pair.frontend.next_event()


def test_an_inflight_region_comes_with_its_descriptor_or_not_at_all() -> None:
    pair = negotiated()
    message = pair.ask(Message(Req.GET_INFLIGHT_FD, Inflight(0, 0, 1, 128)))
    for inflight, fds in ((Inflight(4096, 0, 1, 128), ()), (Inflight(0, 0, 0, 0), ("fd",))):
        with pytest.raises(LocalProtocolError, match="descriptors"):
            pair.backend.answer(message, inflight, fds)
    assert pair.answer(message, Inflight(0, 0, 0, 0)).fds == ()
    pair.frontend.send(Message(Req.GET_INFLIGHT_FD, Inflight(0, 0, 1, 128)))
    pair.frontend.receive(wire(Req.GET_INFLIGHT_FD, Inflight(4096, 0, 1, 128).pack(), REPLY))
    with pytest.raises(RemoteProtocolError, match="descriptors"):
        pair.frontend.next_event()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Message(Req.SET_VRING_NUM, U64(1)), "carries VringState, not U64"),
        (Message(Req.SET_VRING_NUM), "carries VringState, not Nothing"),
        (Message(Req.SET_FEATURES, U64(1 << 64)), "U64"),
        (Message(BackendRequest.VRING_CALL, VringState(0, 0)), "other channel"),
        (Message(-1, Raw(b"")), "32 bits"),
        (Message(1 << 32, Raw(b"")), "32 bits"),
        (Message(1005, Raw(bytes(MAX_PAYLOAD + 1))), "4097 bytes"),
        (Message(1005, Raw(b""), tuple(map(str, range(33)))), "33 descriptors"),
        (Message(1005, U64(0)), "carries Raw"),
        (Message(Req.SET_VRING_KICK, VringFd.of(0)), "0 descriptors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "message",
)
def test_what_may_not_be_sent_is_refused_and_changes_nothing(message: Message[str], reason: str) -> None:
    pair = negotiated()
    with pytest.raises(LocalProtocolError, match=reason):
        pair.frontend.send(message)
    assert not pair.frontend.awaits_reply
    assert pair.frontend.features == EVERY_BIT
    assert pair.ask(Message(Req.SET_OWNER)) == Message(Req.SET_OWNER)


def test_the_end_that_is_asked_sends_no_requests() -> None:
    pair = negotiated()
    with pytest.raises(LocalProtocolError, match="answers requests"):
        pair.backend.send(Message(Req.SET_OWNER))
    with pytest.raises(LocalProtocolError, match="answers requests"):
        Connection[str](Role.FRONTEND, nested=True).send(Message(BackendRequest.CONFIG_CHANGE_MSG))


def test_a_reply_needs_its_payload_and_its_descriptors() -> None:
    pair = negotiated()
    message = pair.ask(Message(Req.GET_QUEUE_NUM))
    for payload, fds in ((VringState(0, 0), ()), (U64(1 << 64), ()), (U64(1), ("fd",))):
        with pytest.raises(LocalProtocolError, match="reply to GET_QUEUE_NUM"):
            pair.backend.answer(message, payload, fds)
    assert pair.answer(message, U64(1)).payload == U64(1)


@pytest.mark.parametrize("code", [-1, 1 << 64])
def test_an_acknowledgement_code_has_64_bits(code: int) -> None:
    pair = negotiated()
    message = pair.ask(Message(Req.SET_OWNER, need_reply=True))
    with pytest.raises(LocalProtocolError, match="acknowledgement of SET_OWNER"):
        pair.backend.acknowledge(message, code)
    assert pair.acknowledge(message) == Reply(Req.SET_OWNER, U64(0), ack=True)


def test_descriptor_counts_follow_the_payload() -> None:
    assert Fds.ONE_PER_REGION.accepted(MemoryTable((R0, R1))) == (2, 2)
    assert Fds.UNLESS_NO_FD.accepted(VringFd(0x100)) == (0, 0)
    assert Fds.UNLESS_NO_FD.accepted(DeviceStateReply(0)) == (1, 1)
    assert Fds.UNLESS_NO_FD.accepted(DeviceStateReply(5)) == (0, 0)
    assert Fds.UNLESS_EMPTY.accepted(Inflight(1, 0, 0, 0)) == (1, 1)
    assert Fds.ONE_PER_REGION.accepted(Nothing()) == (0, 0)
    assert Fds.ANY.accepted(Nothing()) == (0, MAX_FDS)
