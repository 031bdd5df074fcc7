"""What a disk takes in one request, and how larger wishes are cut to fit. Touches nothing.

From the features and the configuration space (virtio: Block Device, Device configuration layout), read as Linux reads
them where they are odd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

from vhostuser.errors import BackendUnfit, RequestRefused
from vhostuser.virtio.blk import SECTOR, BlkFeature, VirtioBlkConfig, ZonedModel

MAX_REQUEST_BYTES: Final = 1 << 20
"""The most data in one request, whatever a device allows: back-ends have limits that they do not tell."""

MAX_SEGMENTS: Final = 126
"""The most data segments in one request: buffers are contiguous, so that more than a few are rarely needed."""

MAX_RANGES: Final = 256
"""The most ranges in one DISCARD or WRITE_ZEROES: one page of them."""

MAX_SEGMENT_BYTES: Final = (1 << 32) - SECTOR
MAX_SECTORS: Final = 1 << 54

Run = tuple[int, int]
"""Address and length in bytes."""


@dataclass(frozen=True, slots=True)
class RangeLimits:
    """What DISCARD or WRITE_ZEROES takes."""

    max_sectors: int  # of one range, whole blocks
    max_ranges: int  # of one request
    align_sectors: int  # where to cut


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """What the requests of one disk have to keep to."""

    num_sectors: int
    block_size: int  # bytes
    read_only: bool
    flushes: bool
    max_bytes: int  # of one request, whole blocks
    max_segments: int
    segment_bytes: int  # whole blocks, or less than one
    discard: RangeLimits | None
    write_zeroes: RangeLimits | None

    @classmethod
    def of(cls, name: str, features: int, config: VirtioBlkConfig, *, queue_size: int, max_bytes: int) -> Self:
        """Read them off. ``max_bytes`` is the caller's own limit. Raises `BackendUnfit` for what cannot be driven."""
        block = config.blk_size if features & BlkFeature.BLK_SIZE else SECTOR
        if block < SECTOR or block & (block - 1) or block > max_bytes:
            raise _unfit(name, f"its block size is {block}")
        if config.capacity > MAX_SECTORS:
            raise _unfit(name, f"its capacity is {config.capacity} sectors")
        if config.model == ZonedModel.HOST_MANAGED and features & BlkFeature.ZONED:
            raise _unfit(name, "it is a host-managed zoned disk")
        # Two descriptors are for header and status, and no chain may be longer than the ring, indirect or not.
        segments = min(max(config.seg_max, 1) if features & BlkFeature.SEG_MAX else 1, queue_size - 2, MAX_SEGMENTS)
        segment = (config.size_max if features & BlkFeature.SIZE_MAX else 0) or MAX_SEGMENT_BYTES
        if segment >= block:
            segment -= segment % block
            largest = segments * segment
        else:
            largest = segments // -(-block // segment) * block
        if largest < block:
            raise _unfit(name, f"no block fits into {segments} segments of {segment} bytes")
        return cls(
            num_sectors=config.capacity,
            block_size=block,
            read_only=bool(features & BlkFeature.RO),
            flushes=bool(features & BlkFeature.FLUSH),
            max_bytes=min(largest, max_bytes - max_bytes % block),
            max_segments=segments,
            segment_bytes=segment,
            discard=_ranges(
                features & BlkFeature.DISCARD,
                config.max_discard_sectors,
                config.max_discard_seg or segments,
                max(config.discard_sector_alignment, block // SECTOR),
                block,
            ),
            write_zeroes=_ranges(
                features & BlkFeature.WRITE_ZEROES,
                config.max_write_zeroes_sectors,
                config.max_write_zeroes_seg or 1,
                block // SECTOR,
                block,
            ),
        )

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self.num_sectors * SECTOR

    def check(self, offset: int, length: int, *, writes: bool) -> None:
        """Raise `RequestRefused` unless ``length`` bytes at ``offset`` may be read or written."""
        if writes and self.read_only:
            raise RequestRefused("the disk is read-only")
        if offset % self.block_size or length % self.block_size:
            raise RequestRefused(f"{length} bytes at {offset} are not whole blocks of {self.block_size} bytes")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RequestRefused(f"{length} bytes at {offset} do not lie in the {self.size} bytes of the disk")

    def cut(self, runs: Sequence[Run]) -> Iterator[list[Run]]:
        """Cut memory into the pieces of one request after another; each run is a whole number of blocks."""
        if len(runs) == 1 and runs[0][1] <= min(self.max_bytes, self.segment_bytes):
            yield list(runs)
            return
        whole = self.segment_bytes >= self.block_size
        step, needed = (
            (self.segment_bytes, 1) if whole else (self.block_size, -(-self.block_size // self.segment_bytes))
        )
        pieces: list[Run] = []
        filled = 0
        for start, size in runs:
            address, end = start, start + size
            while address < end:
                if filled == self.max_bytes or len(pieces) + needed > self.max_segments:
                    yield pieces
                    pieces, filled = [], 0
                part = min(end - address, step, self.max_bytes - filled)
                pieces += self._segments(address, part)
                filled += part
                address += part
        if pieces:
            yield pieces

    def _segments(self, address: int, length: int) -> list[Run]:
        step = self.segment_bytes
        return [(address + at, min(step, length - at)) for at in range(0, length, step)]


def shrunk(old: DiskLimits, new: DiskLimits) -> str | None:
    """What ``new`` takes less of than ``old``, as a sentence; None when every request that fits one fits the other."""
    if new.block_size > old.block_size:
        return f"its blocks are {new.block_size} bytes now, and were {old.block_size}"
    pairs = [
        ("its size in sectors", old.num_sectors, new.num_sectors),
        ("the most segments of one request", old.max_segments, new.max_segments),
        ("the most bytes of one segment", old.segment_bytes, new.segment_bytes),
        ("the most bytes of one request", old.max_bytes, new.max_bytes),
    ]
    for name, before, now in (("discard", old.discard, new.discard), ("zeroes", old.write_zeroes, new.write_zeroes)):
        if before is not None and now is not None:
            pairs.append((f"the most sectors of one range to {name}", before.max_sectors, now.max_sectors))
            pairs.append((f"the most ranges to {name}", before.max_ranges, now.max_ranges))
    for what, least, most in pairs:
        if most < least:
            return f"{what} is {most} now, and was {least}"
    return None


def cut_ranges(limits: RangeLimits, offset: int, length: int) -> Iterator[list[Run]]:
    """Cut bytes of the disk into (sector, sectors) of one request after another."""
    sector, end = offset // SECTOR, (offset + length) // SECTOR
    align, most = limits.align_sectors, limits.max_sectors
    ranges: list[Run] = []
    while sector < end:
        stop = min(sector + most, end)
        if stop < end and stop - stop % align > sector:
            stop -= stop % align
        ranges.append((sector, stop - sector))
        sector = stop
        if len(ranges) == limits.max_ranges:
            yield ranges
            ranges = []
    if ranges:
        yield ranges


def _ranges(offered: int, max_sectors: int, max_ranges: int, align: int, block: int) -> RangeLimits | None:
    """0 sectors mean no limit; a range holds a whole number of blocks, at least one."""
    if not offered:
        return None
    per_block = block // SECTOR
    most = min(max_sectors or 0xFFFF_FFFF, 0xFFFF_FFFF)
    return RangeLimits(max(most - most % per_block, per_block), max(1, min(max_ranges, MAX_RANGES)), align)


def _unfit(name: str, cause: str) -> BackendUnfit:
    return BackendUnfit(name, cause, "Report it to the makers of the back-end, or correct its options")
