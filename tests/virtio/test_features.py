"""Feature and status bits of the virtio specification, by number."""

from __future__ import annotations

import pytest

from vhostuser.virtio.blk import BlkFeature
from vhostuser.virtio.features import RingFeature, feature_names
from vhostuser.virtio.status import DeviceStatus

RING_BITS = {
    24: "NOTIFY_ON_EMPTY",
    27: "ANY_LAYOUT",
    28: "INDIRECT_DESC",
    29: "EVENT_IDX",
    32: "VERSION_1",
    33: "ACCESS_PLATFORM",
    34: "RING_PACKED",
    35: "IN_ORDER",
    36: "ORDER_PLATFORM",
    37: "SR_IOV",
    38: "NOTIFICATION_DATA",
    39: "NOTIF_CONFIG_DATA",
    40: "RING_RESET",
    41: "ADMIN_VQ",
    43: "SUSPEND",
}
BLK_BITS = {
    0: "BARRIER",
    1: "SIZE_MAX",
    2: "SEG_MAX",
    4: "GEOMETRY",
    5: "RO",
    6: "BLK_SIZE",
    7: "SCSI",
    9: "FLUSH",
    10: "TOPOLOGY",
    11: "CONFIG_WCE",
    12: "MQ",
    13: "DISCARD",
    14: "WRITE_ZEROES",
    15: "LIFETIME",
    16: "SECURE_ERASE",
    17: "ZONED",
}
STATUS_BITS = {
    0: "ACKNOWLEDGE",
    1: "DRIVER",
    2: "DRIVER_OK",
    3: "FEATURES_OK",
    4: "SUSPEND",
    6: "DEVICE_NEEDS_RESET",
    7: "FAILED",
}


@pytest.mark.parametrize(
    ("kind", "bits"), [(RingFeature, RING_BITS), (BlkFeature, BLK_BITS), (DeviceStatus, STATUS_BITS)]
)
def test_every_bit_has_its_number(kind: type[RingFeature | BlkFeature | DeviceStatus], bits: dict[int, str]) -> None:
    assert {member.bit_length() - 1: member.name for member in kind} == bits


def test_names_are_those_of_the_bits_set_lowest_first() -> None:
    assert feature_names(1 << 32 | 1 << 9 | 1 << 28, BlkFeature) == ["FLUSH", "INDIRECT_DESC", "VERSION_1"]
    assert feature_names(1 << 9 | 1 << 63) == ["bit 9", "bit 63"]
    assert feature_names(0) == []
