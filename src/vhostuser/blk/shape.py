"""What a guest is offered of a disk: feature bits and the configuration space. Touches nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from vhostuser.backend.device import MAX_QUEUES
from vhostuser.disks.disk import SECTOR, Capability, Limits
from vhostuser.errors import OperatorError, UsageError
from vhostuser.virtio.blk import ID_BYTES, BlkFeature, VirtioBlkConfig
from vhostuser.virtio.features import RingFeature

MAX_BLOCK_SIZE: Final = 65536
"""The largest page of any guest: none takes larger logical blocks. x86 takes 4096 at most."""

DEFAULT_SEG_MAX: Final = 126
"""Fits a ring of 128 entries, QEMU's default, without indirect descriptors."""


POLL_US: Final = 50
"""Waking a sleeper takes 20 microseconds or more, twice for each request of a guest that sleeps too: measured."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator says about the shape of one disk; `check` says whether it makes sense."""

    num_queues: int = 1
    num_workers: int | None = None
    serial: str = ""
    block_size: int | None = None
    physical_block_size: int | None = None
    seg_max: int = DEFAULT_SEG_MAX
    size_max: int = 0
    poll_us: int = POLL_US

    def check(self) -> None:
        """Raise `UsageError` for a number out of range, whatever the disk."""
        for name, value, least, most in (
            ("queues", self.num_queues, 1, MAX_QUEUES),
            ("threads", self.num_workers or 1, 1, self.num_queues),
            ("seg-max", self.seg_max, 1, 32766),
            ("size-max", self.size_max or 4096, 4096, (1 << 32) - 1),
            ("poll-us", self.poll_us, 0, 1_000_000),
        ):
            if not least <= value <= most:
                raise UsageError(f"{name} {value}", f"it must be {least} to {most}", "Choose another number")
        for name, size in (("block-size", self.block_size), ("physical-block-size", self.physical_block_size)):
            if size is not None and not (SECTOR <= size <= MAX_BLOCK_SIZE and size & (size - 1) == 0):
                raise UsageError(
                    f"{name} {size}", f"it must be a power of two from {SECTOR} to {MAX_BLOCK_SIZE}", "Use 512 or 4096"
                )
        if not self.serial.isascii() or not self.serial.isprintable() or len(self.serial) > ID_BYTES:
            raise UsageError(
                f"serial {self.serial!r}", f"it must be printable ASCII, {ID_BYTES} characters at most", "Shorten it"
            )


def whole_sectors(name: str, size: int, block_size: int) -> tuple[int, int]:
    """How many sectors of a disk of ``size`` bytes are served, and how many bytes behind them are not.

    Raises `UsageError` when it is less than one block of ``block_size``.
    """
    blocks, tail = divmod(size, block_size)
    if blocks == 0:
        raise UsageError(
            name, f"{size} bytes are less than one block of {block_size}", "Make the disk larger, or its blocks smaller"
        )
    return blocks * block_size // SECTOR, tail


def block_size_of(name: str, limits: Limits, options: Options) -> int:
    """The logical block size to serve, in bytes. Raises `OperatorError` when storage does not allow it."""
    size = options.block_size or limits.block_size
    if size < limits.block_size:
        raise OperatorError(
            name,
            f"its storage takes only whole blocks of {limits.block_size} bytes, so blocks of {size} cannot be served",
            f"Use --block-size {limits.block_size}, or --cache writeback if that is on account of direct I/O",
        )
    if size > MAX_BLOCK_SIZE:
        raise OperatorError(name, f"its blocks of {size} bytes are too large for a guest", "Use other storage")
    return size


def features_of(able: Capability, options: Options) -> int:
    """The feature bits to offer: never one without its behaviour."""
    features = int(RingFeature.VERSION_1 | RingFeature.INDIRECT_DESC | RingFeature.EVENT_IDX)
    features |= BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.TOPOLOGY | BlkFeature.MQ
    offered = {
        BlkFeature.SIZE_MAX: options.size_max > 0,
        BlkFeature.RO: Capability.WRITE not in able,
        BlkFeature.FLUSH | BlkFeature.CONFIG_WCE: Capability.FLUSH in able,
        BlkFeature.DISCARD: Capability.WRITE | Capability.DISCARD in able,
        BlkFeature.WRITE_ZEROES: Capability.WRITE | Capability.WRITE_ZEROES in able,
    }
    for bits, offer in offered.items():
        features |= bits if offer else 0
    return features


def config_of(limits: Limits, features: int, block_size: int, options: Options) -> VirtioBlkConfig:
    """The configuration space, but for ``capacity`` and ``writeback``. Fields of features not offered are 0.

    Raises `UsageError` for a physical block smaller than a logical one.
    """
    physical = options.physical_block_size or max(block_size, limits.physical_block_size)
    if physical < block_size:
        raise UsageError(
            f"physical-block-size {physical}", f"it is smaller than the logical one, {block_size}", "Make it larger"
        )
    config = VirtioBlkConfig(
        seg_max=options.seg_max,
        size_max=options.size_max,
        blk_size=block_size,
        physical_block_exp=(physical // block_size).bit_length() - 1,
        min_io_size=min(max(limits.min_io_size, physical) // block_size, 0xFFFF),
        opt_io_size=min(limits.opt_io_size // block_size, 0xFFFFFFFF),
        num_queues=options.num_queues,
    )
    return _with_ranges(config, limits, features, block_size)


def _with_ranges(config: VirtioBlkConfig, limits: Limits, features: int, block_size: int) -> VirtioBlkConfig:
    if features & BlkFeature.DISCARD:
        config = replace(
            config,
            max_discard_sectors=limits.max_discard // block_size * block_size // SECTOR,
            max_discard_seg=limits.max_segments,
            discard_sector_alignment=max(limits.discard_alignment, block_size) // SECTOR,
        )
    if features & BlkFeature.WRITE_ZEROES:
        config = replace(
            config,
            max_write_zeroes_sectors=limits.max_write_zeroes // block_size * block_size // SECTOR,
            max_write_zeroes_seg=limits.max_segments,
            write_zeroes_may_unmap=int(limits.write_zeroes_may_unmap),
        )
    return config
