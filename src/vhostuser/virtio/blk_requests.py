"""Requests of a virtio block device, as a driver makes them (virtio: Block Device, Device Operation). Touches nothing.

Everything is little-endian here, as in `blk`.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import ClassVar, Final, Self


class BlkRequestType(IntEnum):
    """The ``type`` of a request (virtio: Block Device, Device Operation)."""

    IN = 0
    OUT = 1
    SCSI_CMD = 2  # legacy
    SCSI_CMD_OUT = 3  # legacy
    FLUSH = 4
    FLUSH_OUT = 5  # legacy
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14
    ZONE_APPEND = 15
    ZONE_REPORT = 16
    ZONE_OPEN = 18
    ZONE_CLOSE = 20
    ZONE_FINISH = 22
    ZONE_RESET = 24
    ZONE_RESET_ALL = 26


BARRIER_FLAG: Final = 0x8000_0000
"""Set in the type by legacy drivers that negotiated BARRIER."""


class BlkStatus(IntEnum):
    """The last byte that a device writes for a request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    ZONE_INVALID_CMD = 3
    ZONE_UNALIGNED_WP = 4
    ZONE_OPEN_RESOURCE = 5
    ZONE_ACTIVE_RESOURCE = 6


@dataclass(frozen=True, slots=True)
class BlkRequestHeader:
    """The first 16 readable bytes of every request."""

    LAYOUT: ClassVar[Struct] = Struct("<IIQ")

    type: int
    reserved: int  # Linux puts the I/O priority here
    sector: int

    def pack(self) -> bytes:
        """Return the 16 bytes. Raises `ValueError` when a number does not fit its field."""
        return _pack(self.LAYOUT, self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read exactly 16 bytes. Raises `ValueError` for another length."""
        return cls(*_unpack(cls.LAYOUT, data, cls.__name__))


class SegmentFlag(IntFlag):
    """Flags of `DiscardWriteZeroes`; bits 1 to 31 are reserved."""

    UNMAP = 1 << 0


@dataclass(frozen=True, slots=True)
class DiscardWriteZeroes:
    """One segment of DISCARD, WRITE_ZEROES or SECURE_ERASE: ``struct virtio_blk_discard_write_zeroes``."""

    LAYOUT: ClassVar[Struct] = Struct("<QII")

    sector: int
    num_sectors: int
    flags: int = 0  # SegmentFlag

    def pack(self) -> bytes:
        """Return the 16 bytes. Raises `ValueError` when a number does not fit its field."""
        return _pack(self.LAYOUT, self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read exactly 16 bytes. Raises `ValueError` for another length."""
        return cls(*_unpack(cls.LAYOUT, data, cls.__name__))


@dataclass(frozen=True, slots=True)
class Lifetime:
    """What GET_LIFETIME answers: ``struct virtio_blk_lifetime``."""

    LAYOUT: ClassVar[Struct] = Struct("<HHH")

    pre_eol_info: int  # reserved blocks used: 0 undefined, 1 below 80 %, 2 from 80 %, 3 from 90 %
    device_lifetime_est_typ_a: int  # 0 undefined, 1..10 up to that many tenths are used, 11 exceeded
    device_lifetime_est_typ_b: int  # likewise

    def pack(self) -> bytes:
        """Return the 6 bytes. Raises `ValueError` for a reserved value, which must not be sent."""
        if not 0 <= self.pre_eol_info <= 3:
            raise ValueError(f"pre_eol_info is 0 to 3, not {self.pre_eol_info}")
        for used in (self.device_lifetime_est_typ_a, self.device_lifetime_est_typ_b):
            if not 0 <= used <= 11:
                raise ValueError(f"a lifetime estimate is 0 to 11, not {used}")
        return _pack(self.LAYOUT, self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read exactly 6 bytes. Raises `ValueError` for another length."""
        return cls(*_unpack(cls.LAYOUT, data, cls.__name__))


def _pack(layout: Struct, record: BlkRequestHeader | DiscardWriteZeroes | Lifetime) -> bytes:
    try:
        return layout.pack(*astuple(record))
    except struct.error as error:
        raise ValueError(f"{type(record).__name__}: {error}") from error


def _unpack(layout: Struct, data: bytes, name: str) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise ValueError(f"{name} is {layout.size} bytes, not {len(data)}")
    return layout.unpack(data)
