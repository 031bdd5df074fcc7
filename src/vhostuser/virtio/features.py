"""Feature bits that every virtio device shares (virtio: Reserved Feature Bits). Touches nothing."""

from __future__ import annotations

from enum import IntFlag


class RingFeature(IntFlag):
    """Bits of the rings and the transport: 24 to 43. The other bits belong to the device type."""

    NOTIFY_ON_EMPTY = 1 << 24  # legacy
    ANY_LAYOUT = 1 << 27  # legacy
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41
    SUSPEND = 1 << 43


def feature_names(features: int, device: type[IntFlag] | None = None) -> list[str]:
    """Return the names of the bits set in ``features``, lowest first; ``bit 5`` where there is none.

    ``device`` names the bits of the device type.
    """
    known = {int(bit): str(bit.name) for kind in (RingFeature, device) if kind is not None for bit in kind}
    bits = (1 << number for number in range(features.bit_length()))
    return [known.get(bit, f"bit {bit.bit_length() - 1}") for bit in bits if features & bit]
