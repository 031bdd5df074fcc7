"""The device status field (virtio: Device Status Field). Touches nothing."""

from __future__ import annotations

from enum import IntFlag


class DeviceStatus(IntFlag):
    """What the driver has got to; 0 resets the device."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    DEVICE_NEEDS_RESET = 64
    FAILED = 128
