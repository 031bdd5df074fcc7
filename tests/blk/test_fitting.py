"""Whether a migrated disk fits: the configuration it had elsewhere, and the state that another back-end saved of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser.blk import BlockDevice
from vhostuser.blk.fitting import DiskState, StateError, misfit, overlaid
from vhostuser.disks import Disk, MemoryDisk
from vhostuser.errors import ConfigRefused
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig

MIB = 1 << 20
ALL = int(
    BlkFeature.SIZE_MAX
    | BlkFeature.SEG_MAX
    | BlkFeature.BLK_SIZE
    | BlkFeature.TOPOLOGY
    | BlkFeature.FLUSH
    | BlkFeature.CONFIG_WCE
    | BlkFeature.MQ
    | BlkFeature.DISCARD
    | BlkFeature.WRITE_ZEROES
)
OURS = VirtioBlkConfig(
    capacity=2048,
    size_max=65536,
    seg_max=126,
    blk_size=512,
    min_io_size=1,
    writeback=1,
    num_queues=4,
    max_discard_sectors=4096,
    max_discard_seg=16,
    discard_sector_alignment=8,
    max_write_zeroes_sectors=8192,
    max_write_zeroes_seg=16,
)
LIMITS = ["capacity", "seg_max", "size_max", "num_queues", "max_discard_sectors", "max_discard_seg"]
LIMITS += ["max_write_zeroes_sectors", "max_write_zeroes_seg"]
GATES = {
    "size_max": BlkFeature.SIZE_MAX,
    "seg_max": BlkFeature.SEG_MAX,
    "blk_size": BlkFeature.BLK_SIZE,
    "num_queues": BlkFeature.MQ,
    "max_discard_sectors": BlkFeature.DISCARD,
    "max_discard_seg": BlkFeature.DISCARD,
    "max_write_zeroes_sectors": BlkFeature.WRITE_ZEROES,
    "max_write_zeroes_seg": BlkFeature.WRITE_ZEROES,
}
HINTS = ["physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size", "discard_sector_alignment"]
FOREIGN = ["cylinders", "heads", "max_secure_erase_sectors", "zone_sectors", "model"]
"""Fields of features that are not offered."""


def test_what_is_the_same_fits() -> None:
    assert misfit(OURS, OURS, ALL) is None


@pytest.mark.parametrize("name", LIMITS)
def test_less_than_ours_fits_and_more_does_not(name: str) -> None:
    had = getattr(OURS, name)
    assert misfit(replace(OURS, **{name: had - 1}), OURS, ALL) is None
    assert misfit(replace(OURS, **{name: had + 1}), OURS, ALL) is not None


@pytest.mark.parametrize("blk_size", [256, 1024, 0])
def test_blocks_of_another_size_do_not_fit(blk_size: int) -> None:
    cause = misfit(replace(OURS, blk_size=blk_size), OURS, ALL)
    assert cause == f"its blocks have {blk_size} bytes, and those here 512"


def test_no_limit_is_more_than_any() -> None:
    assert misfit(replace(OURS, size_max=0), OURS, ALL) == "its size_max is unlimited, and 65536 here"


@pytest.mark.parametrize("name", [*HINTS, *FOREIGN])
def test_hints_and_fields_of_features_not_offered_may_be_anything(name: str) -> None:
    assert misfit(replace(OURS, **{name: 7}), OURS, ALL) is None


@pytest.mark.parametrize(("name", "feature"), GATES.items())
def test_a_field_without_its_feature_means_nothing(name: str, feature: BlkFeature) -> None:
    told = replace(OURS, **{name: 99999})
    assert misfit(told, OURS, ALL) is not None
    assert misfit(told, OURS, ALL & ~feature) is None


@pytest.mark.parametrize(("offset", "size"), [(0, 60), (0, 96), (0, 8), (20, 4), (36, 24), (95, 1), (0, 256), (60, 40)])
def test_our_own_bytes_change_nothing_wherever_they_are_laid(offset: int, size: int) -> None:
    assert overlaid(OURS, offset, OURS.read(offset, size)) == OURS


@pytest.mark.parametrize(
    ("offset", "data"), [(0, b""), (96, b"\0"), (96, b"\1"), (90, bytes(6) + b"\1"), (4000, b"\0")]
)
def test_what_is_no_part_of_the_configuration_is_nothing(offset: int, data: bytes) -> None:
    assert overlaid(OURS, offset, data) is None


# -- a device ---------------------------------------------------------------------------------------------------------

Make = Callable[..., BlockDevice]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def device(disk: Disk | None = None, **options: object) -> BlockDevice:
            served = stack.enter_context(disk or MemoryDisk(MIB))
            made = BlockDevice(served, **options)  # type: ignore[arg-type]
            stack.callback(made.close)
            return made

        yield device


@pytest.mark.parametrize("flags", [1, 2])
@pytest.mark.parametrize(("offset", "size"), [(0, 60), (0, 96), (0, 256), (0, 8), (20, 4), (36, 24)])
def test_the_configuration_of_a_like_disk_is_taken(make: Make, offset: int, size: int, flags: int) -> None:
    device = make()
    before, generation = device.read_config(0, 96), device.config_generation
    device.write_config(offset, device.read_config(offset, size), flags)
    assert device.read_config(0, 96) == before
    assert device.config_generation == generation


def test_the_configuration_of_a_larger_disk_is_refused_and_that_of_a_smaller_one_taken(make: Make) -> None:
    device = make()
    sectors = MIB // 512
    device.write_config(0, (sectors - 8).to_bytes(8, "little"), 1)
    with pytest.raises(ConfigRefused, match=f"it has {sectors + 8} sectors, and the disk here {sectors}"):
        device.write_config(0, (sectors + 8).to_bytes(8, "little"), 1)
    assert device.size == MIB


def test_a_disk_that_was_resized_meanwhile_is_looked_at_again(make: Make) -> None:
    disk = MemoryDisk(MIB)
    device = make(disk)
    disk.resize(2 * MIB)
    device.write_config(0, (2 * MIB // 512).to_bytes(8, "little"), 1)
    assert device.size == 2 * MIB


def test_the_cache_byte_within_a_range_is_the_driver_s(make: Make) -> None:
    device = make()
    off = replace(VirtioBlkConfig.unpack(device.read_config(0, 96)), writeback=0).pack()
    device.write_config(0, off, 1)
    assert not device.writeback
    with pytest.raises(ConfigRefused, match="its writeback is 2"):
        device.write_config(32, b"\2\0", 1)


def test_a_state_crosses_to_a_like_disk_with_the_mode_of_its_write_cache(make: Make) -> None:
    source, destination = make(), make()
    source.write_config(32, b"\0", 0)
    generation = destination.config_generation
    destination.load_state(source.save_state())
    assert not destination.writeback
    assert destination.read_config(32, 1) == b"\0"
    assert destination.config_generation == generation + 1, "its driver is told"
    destination.features_acked(int(BlkFeature.CONFIG_WCE | BlkFeature.FLUSH))
    assert not destination.writeback
    source.write_config(32, b"\1", 0)
    destination.load_state(source.save_state())
    assert destination.writeback


def test_a_state_is_as_long_as_its_description_says(make: Make) -> None:
    state = make().save_state()
    assert len(state) == DiskState.SIZE == 128
    assert state[:12] == b"vhu-disk\1\0\x80\0"
    assert DiskState.unpack(state).pack() == state


STATE = DiskState(ALL, True, OURS).pack()


def signed(body: bytes) -> bytes:
    """A state with this body, whose checksum is right."""
    return STATE[:12] + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (b"", "it ends after 0 bytes"),
        (STATE[:15], "it ends after 15 bytes"),
        (STATE[:-1], "it has 127 bytes instead of 128"),
        (STATE + b"\0", "it has 129 bytes instead of 128"),
        (b"X" + STATE[1:], "it is no state of a disk of ours"),
        (STATE[:8] + b"\2\0" + STATE[10:], "it is of version 2, and 1 is what is known here"),
        (STATE[:-1] + b"\1", "its checksum is wrong"),
        (signed(STATE[16:24] + b"\2" + STATE[25:]), "it has bytes set that mean nothing"),
        (signed(STATE[16:31] + b"\1" + STATE[32:]), "it has bytes set that mean nothing"),
    ],
)
def test_what_is_no_state_of_ours_is_refused_and_changes_nothing(make: Make, state: bytes, said: str) -> None:
    device = make()
    before = device.read_config(0, 96)
    with pytest.raises(StateError, match=said):
        DiskState.unpack(state)
    with pytest.raises(ConfigRefused, match=f"the state is refused: {said}"):
        device.load_state(state)
    assert device.read_config(0, 96) == before


@given(st.binary(max_size=300))
def test_no_bytes_at_all_are_more_than_refused(data: bytes) -> None:
    with pytest.raises(StateError):
        DiskState.unpack(data)


@given(st.integers(0, DiskState.SIZE * 8 - 1))
def test_one_wrong_bit_is_found_wherever_it_is(bit: int) -> None:
    damaged = bytearray(STATE)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StateError):
        DiskState.unpack(bytes(damaged))


@pytest.mark.parametrize(
    ("source", "destination", "said"),
    [
        ({"disk": 2 * MIB}, {}, "it has 4096 sectors, and the disk here 2048"),
        ({}, {"block_size": 4096}, "its blocks have 512 bytes, and those here 4096"),
        ({"num_queues": 4}, {"num_queues": 2}, "its num_queues is 4, and 2 here"),
        ({"seg_max": 126}, {"seg_max": 62}, "its seg_max is 126, and 62 here"),
        ({}, {"read_only": True}, "which is not offered here"),
    ],
)
def test_a_state_of_a_disk_that_does_not_fit_is_refused_and_changes_nothing(
    make: Make, source: dict[str, object], destination: dict[str, object], said: str
) -> None:
    def made(options: dict[str, object]) -> BlockDevice:
        rest = dict(options)
        size, read_only = rest.pop("disk", MIB), bool(rest.pop("read_only", False))
        assert isinstance(size, int)
        return make(MemoryDisk(size, read_only=read_only), **rest)

    theirs, ours = made(source), made(destination)
    theirs.write_config(32, b"\0", 0)
    before = ours.read_config(0, 96)
    with pytest.raises(ConfigRefused, match="the state is of another disk: .*" + said):
        ours.load_state(theirs.save_state())
    assert ours.read_config(0, 96) == before


def test_a_disk_that_could_be_written_does_not_go_on_where_it_can_only_be_read() -> None:
    state = DiskState(int(BlkFeature.BLK_SIZE), True, OURS)
    cause = state.misfit(OURS, int(BlkFeature.BLK_SIZE | BlkFeature.RO))
    assert cause == "it could be written, and can only be read here"
