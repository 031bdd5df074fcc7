"""Whether a disk that a driver knows can go on here: configurations and states of migrated disks. Touches nothing."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, Self

from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig
from vhostuser.virtio.features import feature_names

_CEILINGS: Final[tuple[tuple[BlkFeature, tuple[str, ...]], ...]] = (
    (BlkFeature.SEG_MAX, ("seg_max",)),
    (BlkFeature.MQ, ("num_queues",)),
    (BlkFeature.DISCARD, ("max_discard_sectors", "max_discard_seg")),
    (BlkFeature.WRITE_ZEROES, ("max_write_zeroes_sectors", "max_write_zeroes_seg")),
)
"""What a driver may use up to, by the feature that gives it a meaning."""


def overlaid(ours: VirtioBlkConfig, offset: int, data: bytes) -> VirtioBlkConfig | None:
    """Our configuration with ``data`` in the place of its bytes from ``offset`` on; None where there are none.

    Zeroes behind the end are what front-ends fill up with.
    """
    size = VirtioBlkConfig.LAYOUT.size
    inside = data[: max(0, size - offset)]
    if not inside or any(data[len(inside) :]):
        return None
    packed = bytearray(ours.pack())
    packed[offset : offset + len(inside)] = inside
    return VirtioBlkConfig.unpack(bytes(packed))


def misfit(theirs: VirtioBlkConfig, ours: VirtioBlkConfig, features: int) -> str | None:
    """Why a driver that believes ``theirs`` cannot go on with a disk of ``ours``; None when it can.

    ``features``: those offered here; a field without its feature has no meaning. A disk that has more than the driver
    knows fits: the driver asks for no more than that.
    """
    if theirs.capacity > ours.capacity:
        return f"it has {theirs.capacity} sectors, and the disk here {ours.capacity}"
    if features & BlkFeature.BLK_SIZE and theirs.blk_size != ours.blk_size:
        return f"its blocks have {theirs.blk_size} bytes, and those here {ours.blk_size}"
    if features & BlkFeature.SIZE_MAX and not 0 < theirs.size_max <= ours.size_max:
        return f"its size_max is {theirs.size_max or 'unlimited'}, and {ours.size_max} here"
    for feature, names in _CEILINGS:
        for name in names if features & feature else ():
            told, had = getattr(theirs, name), getattr(ours, name)
            if told > had:
                return f"its {name} is {told}, and {had} here"
    if features & BlkFeature.CONFIG_WCE and theirs.writeback > 1:
        return f"its writeback is {theirs.writeback}, neither 0 nor 1"
    return None


class StateError(ValueError):
    """Bytes that are no state of a disk that we know; the text says why."""


@dataclass(frozen=True, slots=True)
class DiskState:
    """What one back-end tells the next one of a disk, for DEVICE_STATE; docs/reference/device-state.md has the layout.

    The content of the disk and what is in flight go other ways.
    """

    MARK: ClassVar[bytes] = b"vhu-disk"
    VERSION: ClassVar[int] = 1
    HEAD: ClassVar[Struct] = Struct("<8sHHI")  # mark, version, bytes in all, CRC-32 of what follows
    BODY: ClassVar[Struct] = Struct("<QB7x")  # features, writeback; the configuration follows
    SIZE: ClassVar[int] = HEAD.size + BODY.size + VirtioBlkConfig.LAYOUT.size

    features: int
    """Virtio features that were offered."""
    writeback: bool
    """Whether the driver has the write cache on, as far as it chose."""
    config: VirtioBlkConfig

    def pack(self) -> bytes:
        """The `SIZE` bytes."""
        body = self.BODY.pack(self.features, self.writeback) + self.config.pack()
        return self.HEAD.pack(self.MARK, self.VERSION, self.SIZE, zlib.crc32(body)) + body

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a state. Raises `StateError` for anything that is not exactly one."""
        if len(data) < cls.HEAD.size:
            raise StateError(f"it ends after {len(data)} bytes")
        mark, version, size, checksum = cls.HEAD.unpack_from(data)
        if mark != cls.MARK:
            raise StateError("it is no state of a disk of ours")
        if version != cls.VERSION:
            raise StateError(f"it is of version {version}, and {cls.VERSION} is what is known here")
        if size != cls.SIZE or len(data) != size:
            raise StateError(f"it has {len(data)} bytes instead of {cls.SIZE}")
        body = data[cls.HEAD.size :]
        if zlib.crc32(body) != checksum:
            raise StateError("its checksum is wrong: it was damaged on its way")
        features, writeback = cls.BODY.unpack_from(body)
        if writeback > 1 or body[: cls.BODY.size] != cls.BODY.pack(features, writeback):
            raise StateError("it has bytes set that mean nothing")
        return cls(features, bool(writeback), VirtioBlkConfig.unpack(body[cls.BODY.size :]))

    def misfit(self, ours: VirtioBlkConfig, features: int) -> str | None:
        """Why a disk of this state cannot go on with one of ``ours`` and these features; None when it can."""
        if lost := self.features & ~features & _BLK_FEATURES:
            return f"it offered {', '.join(feature_names(lost, BlkFeature))}, which is not offered here"
        if features & ~self.features & BlkFeature.RO:
            return "it could be written, and can only be read here"
        return misfit(self.config, ours, features & self.features)


_BLK_FEATURES: Final = sum(BlkFeature)
"""The bits that are a disk's, and not the transport's: a front-end negotiates those anew."""
