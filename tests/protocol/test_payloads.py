"""Table: every message's bytes and values, in both directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.protocol.vectors import BACKEND_VECTORS, FRONTEND_VECTORS, Vector

from vhostuser.protocol import (
    U64,
    BackendRequest,
    Config,
    DeviceStateReply,
    FrontendRequest,
    Inflight,
    Iotlb,
    MemoryRegion,
    MemoryTable,
    Payload,
    SharedObject,
    ShmemConfig,
    SingleRegion,
    Violation,
    VringArea,
    VringFd,
    VringState,
    XenMemoryRegion,
    XenMemoryTable,
    XenSingleRegion,
)

VECTORS = FRONTEND_VECTORS + BACKEND_VECTORS


def name(vector: Vector) -> str:
    return repr(vector.request)


def test_the_table_has_every_message_of_both_channels() -> None:
    assert [vector.request for vector in FRONTEND_VECTORS] == list(FrontendRequest) == list(range(1, 46))
    assert [vector.request for vector in BACKEND_VECTORS] == list(BackendRequest) == list(range(1, 11))


@pytest.mark.parametrize("vector", VECTORS, ids=name)
def test_bytes_and_values_of_a_message_agree(vector: Vector) -> None:
    assert vector.payload.pack() == vector.data
    assert type(vector.payload).unpack(vector.data) == vector.payload
    if vector.reply is not None:
        assert vector.reply.pack() == vector.reply_data
        assert type(vector.reply).unpack(vector.reply_data) == vector.reply


@pytest.mark.parametrize("vector", [v for v in VECTORS if v.data and v.wire != "c0ffee"], ids=name)
def test_a_payload_cut_short_anywhere_is_a_violation(vector: Vector) -> None:
    kind = type(vector.payload)
    useful = getattr(kind, "USEFUL", 0) or len(vector.data)
    for length in range(useful):
        with pytest.raises(Violation):
            kind.unpack(vector.data[:length])


LAX = (MemoryTable, Config)


@pytest.mark.parametrize("vector", [v for v in VECTORS if v.wire != "c0ffee"], ids=name)
def test_a_payload_with_a_tail_is_a_violation_except_where_peers_send_one(vector: Vector) -> None:
    kind = type(vector.payload)
    if kind in LAX:
        assert kind.unpack(vector.data + b"tail") == vector.payload
    else:
        with pytest.raises(Violation):
            kind.unpack(vector.data + b"t")


@pytest.mark.parametrize(("kind", "useful"), [(Iotlb, 26), (Inflight, 20)])
def test_tail_padding_of_a_c_structure_may_be_missing(kind: type[Payload], useful: int) -> None:
    data = bytes(range(1, useful + 1))
    assert kind.unpack(data) == kind.unpack(data.ljust(kind.unpack(data).pack().__len__(), b"\0"))
    with pytest.raises(Violation):
        kind.unpack(data[:-1])


XEN_REGION = "0000000001000000 0010000000000000 000000c0ff7f0000 0020000000000000 01010000 05000000"


def test_xen_regions_are_forty_bytes() -> None:
    region = XenMemoryRegion(0x1_0000_0000, 0x1000, 0x7FFF_C000_0000, 0x2000, 0x101, 5)
    assert region.pack() == bytes.fromhex(XEN_REGION)
    table = bytes.fromhex(f"01000000 00000000 {XEN_REGION}")
    assert XenMemoryTable.unpack(table) == XenMemoryTable((region,))
    assert XenMemoryTable((region,)).pack() == table
    assert XenSingleRegion.unpack(bytes(8) + region.pack()) == XenSingleRegion(region)
    assert XenSingleRegion(region).pack() == bytes(8) + region.pack()


@pytest.mark.parametrize(
    "build",
    [
        lambda: U64(1 << 64).pack(),
        lambda: U64(-1).pack(),
        lambda: VringState(1 << 32, 0).pack(),
        lambda: VringFd.of(256),
        lambda: VringFd.of(-1),
        lambda: Config(0, 4, 0, b"abc").pack(),
        lambda: Config(1 << 32, 0, 0, b"").pack(),
        lambda: SharedObject(bytes(15)).pack(),
        lambda: SharedObject(bytes(17)).pack(),
        lambda: ShmemConfig(0, (0,) * 255).pack(),
        lambda: ShmemConfig.of((1 << 64,)).pack(),
        lambda: MemoryTable((XenMemoryRegion(0, 0, 0, 0, 0, 0),)).pack(),
        lambda: XenSingleRegion(MemoryRegion(0, 0, 0, 0)).pack(),
        lambda: SingleRegion(MemoryRegion(-1, 0, 0, 0)).pack(),
    ],
)
def test_a_value_that_does_not_fit_is_a_violation(build: Callable[[], object]) -> None:
    with pytest.raises(Violation):
        build()


def test_a_table_counting_more_regions_than_it_carries_is_a_violation() -> None:
    for count in (2, 0xFFFF_FFFF):
        with pytest.raises(Violation, match="does not fit"):
            MemoryTable.unpack(count.to_bytes(4, "little") + bytes(4 + 32))


def test_ring_descriptors_say_index_and_presence() -> None:
    assert VringFd.of(7) == VringFd(7)
    assert VringFd.of(7, no_fd=True) == VringFd(0x107)
    assert (VringFd(0x1FF).index, VringFd(0x1FF).no_fd) == (255, True)
    assert (DeviceStateReply.of(), DeviceStateReply.of(5)) == (DeviceStateReply(0x100), DeviceStateReply(0x105))
    assert [DeviceStateReply.of(code).error for code in (0, 7, 1000)] == [0, 7, 255]
    assert [DeviceStateReply(value).no_fd for value in (0, 1, 0x100, 0x101)] == [False, True, True, True]
    assert (VringArea(0x102, 0, 0).index, VringArea(0x102, 0, 0).no_fd) == (2, True)


def test_shared_memory_sizes_are_counted_and_filled_up() -> None:
    config = ShmemConfig.of((0, 4096))
    assert config.nregions == 1
    assert len(config.sizes) == 256
    assert len(config.pack()) == 2056
