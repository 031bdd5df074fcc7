"""What the guest's kernel sees of the device: each feature, each limit, and that they are true."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.guest.backends import Ours
from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB, blank, digest, noise
from tests.guest.machines import Disk, Guest

pytestmark = pytest.mark.guest

FEATURES = {
    "SEG_MAX": 2,
    "BLK_SIZE": 6,
    "FLUSH": 9,
    "TOPOLOGY": 10,
    "CONFIG_WCE": 11,
    "MQ": 12,
    "DISCARD": 13,
    "WRITE_ZEROES": 14,
    "INDIRECT_DESC": 28,
    "EVENT_IDX": 29,
    "VERSION_1": 32,
}
READ_ONLY = 5


def attribute(guest: Guest, disk: str, path: str) -> str:
    """One attribute of a disk in sysfs."""
    return guest.run(f"cat /sys/block/{disk}/{path}").strip()


def features(guest: Guest, disk: str) -> set[int]:
    """The feature bits that the guest's driver and the device agreed on."""
    return {bit for bit, digit in enumerate(attribute(guest, disk, "device/features")) if digit == "1"}


@pytest.mark.covers(
    *(f"VIRTIO_BLK_F_{name}" for name in ("SEG_MAX", "BLK_SIZE", "FLUSH", "TOPOLOGY", "CONFIG_WCE", "MQ")),
    *("VIRTIO_BLK_F_DISCARD", "VIRTIO_BLK_F_WRITE_ZEROES"),
    *("VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_EVENT_IDX", "VIRTIO_F_VERSION_1"),
)
def test_the_kernel_sees_every_feature_with_its_value(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image, queues=4)
    guest = boot(Disk(backend.socket, options={"num-queues": 4}), cpus=4, memory_mib=512)
    missing = {name for name, bit in FEATURES.items() if bit not in features(guest, "vda")}
    assert not missing
    assert READ_ONLY not in features(guest, "vda")
    assert attribute(guest, "vda", "size") == str(64 * MIB // 512)
    assert attribute(guest, "vda", "ro") == "0"
    assert attribute(guest, "vda", "queue/logical_block_size") == "512"
    assert attribute(guest, "vda", "queue/write_cache") == "write back"
    assert attribute(guest, "vda", "queue/fua") == "0"
    assert attribute(guest, "vda", "queue/max_segments") == "126"
    assert int(attribute(guest, "vda", "queue/discard_max_bytes")) >= MIB
    assert int(attribute(guest, "vda", "queue/discard_granularity")) >= 512
    assert int(attribute(guest, "vda", "queue/write_zeroes_max_bytes")) >= MIB
    assert len(guest.run("ls /sys/block/vda/mq").split()) == 4


@pytest.mark.covers("VHOST_USER_PROTOCOL_F_MQ", "VIRTIO_BLK_F_MQ")
def test_four_queues_carry_requests_at_once(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image, queues=4)
    guest = boot(Disk(backend.socket, options={"num-queues": 4}), cpus=4, memory_mib=512)
    said = guest.run("load --direct --discard --threads=8 --seconds=4 --largest=256K /dev/vda")
    assert said.startswith("load: ok"), said
    interrupts = guest.run("grep virtio0-req /proc/interrupts").splitlines()
    used = [line for line in interrupts if any(int(count) for count in line.split()[1:5])]
    assert len(interrupts) == len(used) == 4, interrupts
    if isinstance(backend, Ours):
        queues = backend.statistics()["queues"]
        assert isinstance(queues, list)
        assert [queue["reads"] > 0 and queue["writes"] > 0 for queue in queues] == [True] * 4


@pytest.mark.covers("VIRTIO_BLK_F_RO")
def test_a_read_only_disk_is_seen_as_one_and_cannot_be_written(serve: Serve, boot: Boot, place: Path) -> None:
    image = noise(place / "ro.img", 4 * MIB)
    before = digest(image)
    guest = boot(Disk(serve(image, read_only=True).socket))
    assert READ_ONLY in features(guest, "vda")
    assert attribute(guest, "vda", "ro") == "1"
    assert guest.run("sha256sum </dev/vda").split()[0] == before
    assert guest.attempt("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct").status != 0
    guest.run("blockdev --setrw /dev/vda || true")  # what a guest would do that does not believe it
    assert guest.attempt("dd if=/dev/zero of=/dev/vda bs=4096 count=1 oflag=direct").status != 0
    assert guest.attempt("blkdiscard -f /dev/vda").status != 0
    assert digest(image) == before


@pytest.mark.parametrize("serial", ["disk-7", "exactly-20-bytes-long"[:20]])
def test_the_serial_number_arrives(serve: Serve, boot: Boot, image: Path, serial: str) -> None:
    guest = boot(Disk(serve(image, serial=serial).socket))
    assert attribute(guest, "vda", "serial") == serial


@pytest.mark.covers("VIRTIO_BLK_F_BLK_SIZE")
def test_disks_of_512_and_4096_byte_blocks_work_side_by_side(serve: Serve, boot: Boot, place: Path) -> None:
    small = serve(blank(place / "small.img", 32 * MIB), block_size=512)
    large = serve(blank(place / "large.img", 32 * MIB), block_size=4096)
    guest = boot(Disk(small.socket, "d0"), Disk(large.socket, "d1"), memory_mib=384)
    for disk, size in (("vda", 512), ("vdb", 4096)):
        assert attribute(guest, disk, "queue/logical_block_size") == str(size)
        assert attribute(guest, disk, "size") == str(32 * MIB // 512)
        said = guest.run(f"load --direct --discard --block={size} --seconds=2 /dev/{disk}")
        assert said.startswith("load: ok"), said
        guest.run(f"mke2fs -q -t ext4 /dev/{disk} && e2fsck -f -n /dev/{disk}")
    assert guest.attempt("dd if=/dev/vdb of=/dev/null bs=512 count=1 iflag=direct").status != 0


@pytest.mark.covers("VIRTIO_BLK_F_TOPOLOGY")
def test_physical_blocks_are_told(serve: Serve, boot: Boot, image: Path) -> None:
    guest = boot(Disk(serve(image, block_size=512, physical_block_size=4096).socket))
    assert attribute(guest, "vda", "queue/logical_block_size") == "512"
    assert attribute(guest, "vda", "queue/physical_block_size") == "4096"


@pytest.mark.covers("VIRTIO_BLK_F_CONFIG_WCE", "VHOST_USER_SET_CONFIG")
def test_the_guest_switches_the_write_cache_off_and_on(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image)
    guest = boot(Disk(backend.socket))
    if attribute(guest, "vda", "cache_type") == "write through":  # where the back-end starts is its own choice
        guest.run("echo write back >/sys/block/vda/cache_type")
    for mode in ("write through", "write back", "write through"):
        guest.run(f"echo {mode} >/sys/block/vda/cache_type")
        assert attribute(guest, "vda", "cache_type") == mode
        assert attribute(guest, "vda", "queue/write_cache") == mode
        if isinstance(backend, Ours):
            assert backend.information()["writeback"] == (mode == "write back")
        said = guest.run("load --direct --discard --seconds=1 /dev/vda")
        assert said.startswith("load: ok"), said
    guest.reset()
    assert attribute(guest, "vda", "cache_type") in ("write through", "write back")


def test_a_write_through_disk_says_so_and_one_without_the_switch_cannot_be_switched(
    serve: Serve, boot: Boot, place: Path
) -> None:
    through = serve(blank(place / "through.img", 8 * MIB), cache="writethrough")
    fixed = serve(blank(place / "fixed.img", 8 * MIB))
    guest = boot(Disk(through.socket, "d0"), Disk(fixed.socket, "d1", options={"config-wce": False}))
    assert attribute(guest, "vda", "cache_type") == "write through"
    assert FEATURES["CONFIG_WCE"] not in features(guest, "vdb")
    assert FEATURES["FLUSH"] in features(guest, "vdb")
    assert guest.attempt("echo write through >/sys/block/vdb/cache_type").status != 0
    for disk in ("vda", "vdb"):
        said = guest.run(f"load --direct --seconds=1 /dev/{disk}")
        assert said.startswith("load: ok"), said
