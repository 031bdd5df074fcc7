"""Payloads of moving a device's state (vhost-user: Migrating back-end state). Touches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import ClassVar, Self

from vhostuser.protocol.layout import Fixed
from vhostuser.protocol.payloads import NO_FD, U64


class Direction(IntEnum):
    """Which way the device state of `DeviceStateParams` goes."""

    SAVE = 0
    LOAD = 1


class Phase(IntEnum):
    """When the device state of `DeviceStateParams` is moved."""

    STOPPED = 0
    """While all rings are stopped."""


@dataclass(frozen=True, slots=True)
class DeviceStateParams(Fixed):
    """How the device state is to be moved (vhost-user: Device state transfer parameters)."""

    LAYOUT: ClassVar[Struct] = Struct("=II")

    direction: int  # Direction
    phase: int  # Phase


@dataclass(frozen=True, slots=True)
class DeviceStateReply(U64):
    """Whether the device state can be moved, and through which descriptor (vhost-user: VHOST_USER_SET_DEVICE_STATE_FD).

    0x100 is success over the front-end's descriptor, 0 success over the one that comes with the reply.
    """

    @classmethod
    def of(cls, error: int = 0) -> Self:
        """Build one that comes without a descriptor: success, or failure with ``error``, 1..255."""
        return cls(NO_FD | min(error, 0xFF))

    @property
    def error(self) -> int:
        """0 for success."""
        return self.value & 0xFF

    @property
    def no_fd(self) -> bool:
        """True when no descriptor comes with the reply; none has to come with a failure."""
        return bool(self.value & NO_FD) or self.error != 0
