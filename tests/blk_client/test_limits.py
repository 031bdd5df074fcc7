"""How requests are cut to what a disk takes: nothing is lost, nothing is too large."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostuser.blk.limits import MAX_REQUEST_BYTES, DiskLimits, RangeLimits, cut_ranges
from vhostuser.errors import BackendUnfit, RequestRefused
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig

F = BlkFeature
EVERYTHING = int(F.SIZE_MAX | F.SEG_MAX | F.BLK_SIZE | F.FLUSH | F.DISCARD | F.WRITE_ZEROES)


def limits(features: int = EVERYTHING, queue_size: int = 128, **config: Any) -> DiskLimits:
    space = VirtioBlkConfig(**{"capacity": 1 << 20, "blk_size": 512, "seg_max": 126, **config})
    return DiskLimits.of("disk", features, space, queue_size=queue_size, max_bytes=MAX_REQUEST_BYTES)


def test_without_features_there_are_sectors_one_segment_and_nothing_else() -> None:
    plain = limits(0, blk_size=77, seg_max=99, size_max=1)
    assert (plain.block_size, plain.max_segments, plain.max_bytes) == (512, 1, MAX_REQUEST_BYTES)
    assert not plain.read_only
    assert not plain.flushes
    assert plain.discard is None
    assert plain.write_zeroes is None


def test_a_segment_size_of_0_is_no_limit_and_a_segment_count_of_0_is_one() -> None:
    """QEMU's storage daemon offers SIZE_MAX with 0."""
    assert limits(size_max=0).max_bytes == MAX_REQUEST_BYTES
    assert limits(seg_max=0).max_segments == 1


def test_a_chain_fits_the_ring() -> None:
    assert limits(queue_size=16).max_segments == 14
    assert limits(queue_size=4, seg_max=1000).max_segments == 2


@pytest.mark.parametrize("size", [0, 1, 511, 513, 768, 1 << 21, 1 << 31])
def test_a_block_size_that_cannot_be_is_unfit(size: int) -> None:
    with pytest.raises(BackendUnfit, match=f"block size is {size}"):
        limits(blk_size=size)


def test_what_else_cannot_be_driven_is_named() -> None:
    with pytest.raises(BackendUnfit, match="its capacity is 18446744073709551615 sectors"):
        limits(capacity=(1 << 64) - 1)
    with pytest.raises(BackendUnfit, match="no block fits into 2 segments of 100 bytes"):
        limits(size_max=100, seg_max=2)
    with pytest.raises(BackendUnfit, match="host-managed"):
        limits(EVERYTHING | F.ZONED, model=1)


@settings(deadline=None)
@given(
    size_max=st.sampled_from([0, 100, 512, 1000, 4096, 5000, 65536]),
    seg_max=st.integers(1, 130),
    block=st.sampled_from([512, 4096]),
    counts=st.lists(st.integers(1, 300), min_size=1, max_size=6),
)
def test_every_request_keeps_to_the_limits_and_together_they_move_every_byte_once(
    size_max: int, seg_max: int, block: int, counts: list[int]
) -> None:
    try:
        found = limits(size_max=size_max, seg_max=seg_max, blk_size=block)
    except BackendUnfit:
        return
    runs = [(number << 32, count * block) for number, count in enumerate(counts)]
    moved: list[tuple[int, int]] = []
    for pieces in found.cut(runs):
        total = sum(length for _, length in pieces)
        assert 0 < total <= found.max_bytes
        assert total % block == 0
        assert 0 < len(pieces) <= min(seg_max, found.max_segments)
        assert all(0 < length <= (size_max or 1 << 32) for _, length in pieces)
        for address, length in pieces:
            if moved and sum(moved[-1]) == address:
                moved[-1] = (moved[-1][0], moved[-1][1] + length)
            else:
                moved.append((address, length))
    assert moved == runs


@settings(deadline=None)
@given(
    offset=st.integers(0, 3000),
    length=st.integers(1, 3000),
    most=st.integers(1, 200),
    count=st.integers(1, 5),
    align=st.sampled_from([1, 8, 64]),
)
def test_ranges_keep_to_the_limits_and_cover_everything_once(
    offset: int, length: int, most: int, count: int, align: int
) -> None:
    covered = offset
    for ranges in cut_ranges(RangeLimits(most, count, align), offset * 512, length * 512):
        assert 0 < len(ranges) <= count
        for sector, sectors in ranges:
            assert sector == covered
            assert 0 < sectors <= most
            covered += sectors
            assert covered % align == 0 or covered == offset + length or sectors < align
    assert covered == offset + length


def test_ranges_are_cut_where_the_disk_is_aligned() -> None:
    found = limits(max_discard_sectors=100, max_discard_seg=2, discard_sector_alignment=64)
    assert found.discard == RangeLimits(100, 2, 64)
    assert list(cut_ranges(found.discard, 10 * 512, 300 * 512)) == [
        [(10, 54), (64, 64)],
        [(128, 64), (192, 64)],
        [(256, 54)],
    ]


def test_no_limit_of_sectors_is_what_32_bits_hold_in_whole_blocks() -> None:
    found = limits(blk_size=4096)
    assert found.discard == RangeLimits(0xFFFF_FFF8, 126, 8)
    assert found.write_zeroes == RangeLimits(0xFFFF_FFF8, 1, 8)


@pytest.mark.parametrize(
    ("offset", "length", "why"),
    [
        (1, 512, "not whole blocks"),
        (0, 511, "not whole blocks"),
        (1 << 29, 512, "do not lie in"),
        (-512, 512, "lie in"),
    ],
)
def test_what_does_not_fit_the_disk_is_refused(offset: int, length: int, why: str) -> None:
    with pytest.raises(RequestRefused, match=why):
        limits().check(offset, length, writes=False)


def test_a_read_only_disk_takes_no_writes() -> None:
    with pytest.raises(RequestRefused, match="read-only"):
        limits(EVERYTHING | F.RO).check(0, 512, writes=True)
    limits(EVERYTHING | F.RO).check(0, 512, writes=False)
