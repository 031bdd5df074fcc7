"""Every message is one line of text with names."""

from __future__ import annotations

import pytest
from tests.protocol.vectors import BACKEND_VECTORS, FRONTEND_VECTORS, Vector

from vhostuser.protocol import (
    U64,
    Config,
    FrontendRequest,
    Iotlb,
    Message,
    Raw,
    Refused,
    Reply,
    SharedObject,
    VringAddr,
    XenMemoryRegion,
    XenSingleRegion,
    describe,
)
from vhostuser.virtio.blk import BlkFeature


@pytest.mark.parametrize("vector", FRONTEND_VECTORS + BACKEND_VECTORS, ids=lambda vector: repr(vector.request))
def test_every_message_is_rendered_with_names(vector: Vector) -> None:
    assert describe(Message(vector.request, vector.payload, vector.fds)) == vector.text
    if vector.reply is not None:
        assert describe(Reply(vector.request, vector.reply, vector.reply_fds)) == vector.reply_text


def test_acknowledgements_refusals_and_unknown_messages_are_rendered() -> None:
    request = FrontendRequest.SET_OWNER
    assert describe(Message(request, need_reply=True)) == "SET_OWNER need_reply"
    assert describe(Reply(request, U64(0), ack=True)) == "ack SET_OWNER ok"
    assert describe(Reply(request, U64(22), ack=True)) == "ack SET_OWNER failed with 22"
    assert describe(Refused(request, 4, "too long", True)) == "refused SET_OWNER of 4 bytes need_reply: too long"
    assert describe(Message(1005, Raw(b"\1\2"))) == "message 1005 2 bytes data=0102"


def test_device_features_get_their_names_from_the_device_type() -> None:
    message: Message[str] = Message(FrontendRequest.SET_FEATURES, U64(1 << 9 | 1 << 26 | 1 << 62))
    assert describe(message, BlkFeature) == "SET_FEATURES 0x4000000004000200 (FLUSH LOG_ALL bit 62)"
    assert describe(Message(FrontendRequest.SET_FEATURES, U64(0))) == "SET_FEATURES 0x0 (none)"


def test_values_without_a_name_are_shown_as_numbers() -> None:
    assert describe(Message(FrontendRequest.SET_PROTOCOL_FEATURES, U64(1 << 40 | 1))).endswith("(MQ bit 40)")
    assert describe(Message(FrontendRequest.SET_STATUS, U64(0x24))) == "SET_STATUS 0x24 (DRIVER_OK|0x20)"
    assert "type=9" in describe(Message(FrontendRequest.IOTLB_MSG, Iotlb(0, 0, 0, 0, 9)))
    assert "flags=0 " in describe(Message(FrontendRequest.SET_VRING_ADDR, VringAddr(0, 0, 0, 0, 0, 0)))
    region = XenSingleRegion(XenMemoryRegion(0, 1, 2, 3, 0x102, 4))
    assert "xen_flags=GRANT|NO_ADVANCE_MAP domid=4" in describe(Message(FrontendRequest.ADD_MEM_REG, region))
    assert describe(Message(FrontendRequest.GET_SHARED_OBJECT, SharedObject(b"\1"))) == "GET_SHARED_OBJECT uuid=01"


def test_long_data_is_cut_off_in_the_text() -> None:
    text = describe(Message(FrontendRequest.SET_CONFIG, Config(0, 256, 1, bytes(256))))
    assert text == f"SET_CONFIG offset=0 size=256 flags=0x1 data={'00' * 64}..."
