"""The block device's layouts, held to bytes written from the offsets of the virtio specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser.virtio.blk import (
    CONFIG_ENDS,
    WRITEBACK_OFFSET,
    BlkFeature,
    VirtioBlkConfig,
    ZonedModel,
    config_length,
)
from vhostuser.virtio.blk_requests import (
    BARRIER_FLAG,
    BlkRequestHeader,
    BlkRequestType,
    BlkStatus,
    DiscardWriteZeroes,
    Lifetime,
)

# Block Device, Device configuration layout: offset, size and name of every field, in the order of the table.
CONFIG_TABLE = [
    (0, 8, "capacity"),
    (8, 4, "size_max"),
    (12, 4, "seg_max"),
    (16, 2, "cylinders"),
    (18, 1, "heads"),
    (19, 1, "sectors"),
    (20, 4, "blk_size"),
    (24, 1, "physical_block_exp"),
    (25, 1, "alignment_offset"),
    (26, 2, "min_io_size"),
    (28, 4, "opt_io_size"),
    (32, 1, "writeback"),
    (34, 2, "num_queues"),
    (36, 4, "max_discard_sectors"),
    (40, 4, "max_discard_seg"),
    (44, 4, "discard_sector_alignment"),
    (48, 4, "max_write_zeroes_sectors"),
    (52, 4, "max_write_zeroes_seg"),
    (56, 1, "write_zeroes_may_unmap"),
    (60, 4, "max_secure_erase_sectors"),
    (64, 4, "max_secure_erase_seg"),
    (68, 4, "secure_erase_sector_alignment"),
    (72, 4, "zone_sectors"),
    (76, 4, "max_open_zones"),
    (80, 4, "max_active_zones"),
    (84, 4, "max_append_sectors"),
    (88, 4, "write_granularity"),
    (92, 1, "model"),
]

FULL = VirtioBlkConfig(
    **{name: int.from_bytes(bytes(range(at + 1, at + size + 1)), "little") for at, size, name in CONFIG_TABLE}
)
PADDING = {33, 57, 58, 59, 93, 94, 95}
FULL_BYTES = bytes(0 if at in PADDING else at + 1 for at in range(96))


def test_the_table_names_every_field_in_order() -> None:
    assert [field.name for field in fields(VirtioBlkConfig)] == [name for _, _, name in CONFIG_TABLE]


@pytest.mark.parametrize(("offset", "size", "name"), CONFIG_TABLE, ids=lambda value: str(value))
def test_a_config_field_lies_where_the_specification_says(offset: int, size: int, name: str) -> None:
    largest = (1 << 8 * size) - 1
    config = VirtioBlkConfig(**{name: largest})
    assert config.pack() == bytes(offset) + b"\xff" * size + bytes(96 - offset - size)
    assert VirtioBlkConfig.unpack(config.pack()) == config
    with pytest.raises(ValueError, match="VirtioBlkConfig"):
        VirtioBlkConfig(**{name: largest + 1}).pack()


def test_the_whole_config_packs_to_its_bytes() -> None:
    assert FULL.pack() == FULL_BYTES
    assert VirtioBlkConfig.unpack(FULL_BYTES) == FULL


@given(st.integers(0, 300))
def test_a_config_of_any_length_is_read_as_far_as_it_goes(length: int) -> None:
    data = FULL_BYTES.ljust(300, b"\xee")[:length]
    expected = data[:96].ljust(96, b"\0")
    assert VirtioBlkConfig.unpack(data).pack() == expected


@pytest.mark.parametrize("size", [0, 1, 36, 48, 57, 60, 96, 256])
@pytest.mark.parametrize("offset", [0, 1, 32, 95, 96, 200])
def test_any_range_can_be_read_and_is_zero_beyond_the_fields(offset: int, size: int) -> None:
    assert FULL.read(offset, size) == FULL_BYTES.ljust(1024, b"\0")[offset : offset + size]


@pytest.mark.parametrize(
    ("features", "length"),
    [
        (0, 8),
        (BlkFeature.MQ, 36),
        (BlkFeature.MQ | BlkFeature.DISCARD, 48),
        (BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES, 57),
        (BlkFeature.SECURE_ERASE, 72),
        (BlkFeature.ZONED, 96),
        (BlkFeature.RO | BlkFeature.FLUSH | 1 << 32, 8),
    ],
)
def test_the_config_is_as_long_as_its_features_need(features: int, length: int) -> None:
    assert config_length(features) == length


def test_every_end_is_that_of_a_field_and_they_rise() -> None:
    ends = [end for _, end in CONFIG_ENDS]
    assert ends == sorted(ends)
    assert set(ends) - {96} <= {at + size for at, size, _ in CONFIG_TABLE}
    assert (WRITEBACK_OFFSET, 1, "writeback") in CONFIG_TABLE


def test_request_types_status_codes_and_models_have_their_numbers() -> None:
    assert {member.name: int(member) for member in BlkRequestType} == {
        "IN": 0,
        "OUT": 1,
        "SCSI_CMD": 2,
        "SCSI_CMD_OUT": 3,
        "FLUSH": 4,
        "FLUSH_OUT": 5,
        "GET_ID": 8,
        "GET_LIFETIME": 10,
        "DISCARD": 11,
        "WRITE_ZEROES": 13,
        "SECURE_ERASE": 14,
        "ZONE_APPEND": 15,
        "ZONE_REPORT": 16,
        "ZONE_OPEN": 18,
        "ZONE_CLOSE": 20,
        "ZONE_FINISH": 22,
        "ZONE_RESET": 24,
        "ZONE_RESET_ALL": 26,
    }
    assert BARRIER_FLAG == 1 << 31
    assert [member.name for member in BlkStatus] == [
        "OK",
        "IOERR",
        "UNSUPP",
        "ZONE_INVALID_CMD",
        "ZONE_UNALIGNED_WP",
        "ZONE_OPEN_RESOURCE",
        "ZONE_ACTIVE_RESOURCE",
    ]
    assert list(BlkStatus) == list(range(7))
    assert list(ZonedModel) == [0, 1, 2]


RECORDS = [
    (BlkRequestHeader(13, 0x8000, 0x123456789), "0d000000 00800000 8967452301000000"),
    (DiscardWriteZeroes(0x123456789, 8, 1), "8967452301000000 08000000 01000000"),
    (Lifetime(2, 1, 11), "0200 0100 0b00"),
]


@pytest.mark.parametrize(("record", "wire"), RECORDS, ids=lambda value: type(value).__name__)
def test_request_structures_and_bytes_agree(
    record: BlkRequestHeader | DiscardWriteZeroes | Lifetime, wire: str
) -> None:
    data = bytes.fromhex(wire)
    assert record.pack() == data
    assert type(record).unpack(data) == record
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(ValueError, match=f"{type(record).__name__} is {len(data)} bytes"):
            type(record).unpack(wrong)


@pytest.mark.parametrize(
    "build",
    [
        lambda: BlkRequestHeader(1 << 32, 0, 0).pack(),
        lambda: DiscardWriteZeroes(-1, 0).pack(),
        lambda: Lifetime(4, 0, 0).pack(),
        lambda: Lifetime(0, 12, 0).pack(),
        lambda: Lifetime(0, 0, 12).pack(),
        lambda: Lifetime(-1, 0, 0).pack(),
    ],
)
def test_numbers_that_do_not_fit_or_are_reserved_are_not_packed(build: Callable[[], bytes]) -> None:
    with pytest.raises(ValueError, match=r"BlkRequestHeader|DiscardWriteZeroes|pre_eol_info|lifetime"):
        build()
