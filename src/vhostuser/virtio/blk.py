"""The virtio block device: feature bits and configuration space (virtio: Block Device). Touches nothing.

Everything is little-endian here. A driver without VERSION_1 uses its own order, which is the same on such hosts.
What a driver asks for is in `blk_requests`: who serves a disk leaves that to the native module, and does not import it.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import ClassVar, Final, Self

DEVICE_ID: Final = 2

SECTOR: Final = 512
"""The unit of every sector number and count of the protocol, in bytes, whatever the block size."""

ID_BYTES: Final = 20
"""The length of what GET_ID answers: ASCII, filled up with zeros."""


class BlkFeature(IntFlag):
    """Feature bits 0 to 23 of a block device (virtio: Block Device, Feature bits)."""

    BARRIER = 1 << 0  # legacy
    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    SCSI = 1 << 7  # legacy
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LIFETIME = 1 << 15
    SECURE_ERASE = 1 << 16
    ZONED = 1 << 17


class ZonedModel(IntEnum):
    """The field ``model`` of `VirtioBlkConfig`."""

    NONE = 0
    HOST_MANAGED = 1
    HOST_AWARE = 2


@dataclass(frozen=True, slots=True)
class VirtioBlkConfig:
    """``struct virtio_blk_config``, 96 bytes (virtio: Block Device, Device configuration layout).

    The members of its inner structures stand here under their own names, in the order of the layout.
    """

    LAYOUT: ClassVar[Struct] = Struct("<QIIHBBIBBHIBxHIIIIIB3xIIIIIIIIB3x")

    capacity: int = 0  # sectors
    size_max: int = 0  # bytes in one segment
    seg_max: int = 0  # data segments in one request
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0  # of the geometry
    blk_size: int = 0  # bytes
    physical_block_exp: int = 0  # log2 of logical blocks in a physical one
    alignment_offset: int = 0  # logical blocks
    min_io_size: int = 0  # logical blocks
    opt_io_size: int = 0  # logical blocks
    writeback: int = 0  # 0 write-through, 1 write-back; the only field a driver may write
    num_queues: int = 0
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0  # sectors
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0
    max_secure_erase_sectors: int = 0
    max_secure_erase_seg: int = 0
    secure_erase_sector_alignment: int = 0  # sectors
    zone_sectors: int = 0
    max_open_zones: int = 0
    max_active_zones: int = 0
    max_append_sectors: int = 0
    write_granularity: int = 0  # bytes
    model: int = 0  # ZonedModel

    def pack(self) -> bytes:
        """Return the 96 bytes. Raises `ValueError` when a number does not fit its field."""
        try:
            return self.LAYOUT.pack(*astuple(self))
        except struct.error as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a configuration of any length: fields that ``data`` does not reach are 0, bytes after it are ignored."""
        size = cls.LAYOUT.size
        return cls(*cls.LAYOUT.unpack(data[:size].ljust(size, b"\0")))

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at ``offset``, as GET_CONFIG asks for them: zeros where there is no field."""
        return self.pack()[offset : offset + size].ljust(size, b"\0")


WRITEBACK_OFFSET: Final = 32
"""Where ``writeback`` lies in the configuration space; it is one byte."""

CONFIG_ENDS: Final[tuple[tuple[BlkFeature, int], ...]] = (
    (BlkFeature.SIZE_MAX, 12),
    (BlkFeature.SEG_MAX, 16),
    (BlkFeature.GEOMETRY, 20),
    (BlkFeature.BLK_SIZE, 24),
    (BlkFeature.TOPOLOGY, 32),
    (BlkFeature.CONFIG_WCE, 33),
    (BlkFeature.MQ, 36),
    (BlkFeature.DISCARD, 48),
    (BlkFeature.WRITE_ZEROES, 57),
    (BlkFeature.SECURE_ERASE, 72),
    (BlkFeature.ZONED, 96),
)
"""Up to which byte of the configuration space a driver looks that has accepted a feature."""


def config_length(features: int) -> int:
    """Return how many bytes of the configuration space have a meaning with ``features``: 8 to 96."""
    return max((end for feature, end in CONFIG_ENDS if features & feature), default=8)
