"""What a person does with a new disk: partitions, a file system, files, reboots, space given back."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB, allocated, blank
from tests.guest.machines import Disk

pytestmark = pytest.mark.guest

FILL = """
for name in a b c d e f; do head -c $((RANDOM % 900000 + 300000)) /dev/urandom >/mnt/$name || exit 1; done
mkdir /mnt/many && for number in $(seq 200); do echo $number >/mnt/many/$number; done
cd /mnt && find . -type f ! -name sums | xargs sha256sum >sums && sync
"""
CHECK = "cd /mnt && sha256sum -c sums >/tmp/said || { cat /tmp/said; exit 1; }"


def test_file_systems_keep_every_checksum_over_reboots(serve: Serve, boot: Boot, place: Path) -> None:
    backend = serve(blank(place / "disk.img", 160 * MIB))
    guest = boot(Disk(backend.socket))
    guest.run("printf 'label: gpt\\n,64M\\n,\\n' | sfdisk -q /dev/vda && mdev -s; [ -b /dev/vda2 ]")
    for number in (1, 2):
        guest.run(f"mke2fs -q -t ext4 /dev/vda{number} && mount /dev/vda{number} /mnt && ({FILL}) && umount /mnt")
    for _ in range(2):
        guest.reset()
        for number in (1, 2):
            guest.run(f"e2fsck -f -n /dev/vda{number}")
            guest.run(
                f"mount /dev/vda{number} /mnt && ({CHECK}) && head -c 99999 /dev/urandom >/mnt/more && umount /mnt"
            )
    guest.run("e2fsck -f -n /dev/vda1 && e2fsck -f -n /dev/vda2")


def test_a_file_system_synced_but_not_unmounted_survives_the_kill_of_its_machine(
    serve: Serve, boot: Boot, image: Path
) -> None:
    backend = serve(image)
    guest = boot(Disk(backend.socket))
    guest.run(f"mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt && ({FILL})")
    guest.kill()
    guest = boot(Disk(backend.socket))
    guest.run(f"mount /dev/vda /mnt && ({CHECK}) && umount /mnt && e2fsck -f -n /dev/vda")


@pytest.mark.covers("VIRTIO_BLK_F_DISCARD")
def test_discarded_space_is_given_back_to_the_host(serve: Serve, boot: Boot, image: Path) -> None:
    guest = boot(Disk(serve(image).socket))
    guest.run("mke2fs -q -t ext4 -E nodiscard /dev/vda && mount /dev/vda /mnt")
    guest.run("head -c 12000000 /dev/urandom >/mnt/big && head -c 100000 /dev/urandom >/mnt/kept && sync")
    sums = guest.run("sha256sum /mnt/kept")
    full = allocated(image)
    assert full > 12_000_000
    guest.run("rm /mnt/big && sync && fstrim -v /mnt")
    trimmed = allocated(image)
    assert trimmed < full - 11_000_000, f"{full} bytes before the trim, {trimmed} after it"
    guest.run("echo 3 >/proc/sys/vm/drop_caches")
    assert guest.run("sha256sum /mnt/kept") == sums
    guest.run("umount /mnt && e2fsck -f -n /dev/vda && blkdiscard /dev/vda")
    assert allocated(image) < MIB
    assert guest.run("head -c 16777216 /dev/vda | cmp - /dev/zero 2>&1 || true").startswith("cmp: EOF on -")


@pytest.mark.covers("VIRTIO_BLK_F_WRITE_ZEROES")
def test_zeroed_ranges_read_as_zeroes_and_nothing_around_them_changes(serve: Serve, boot: Boot, image: Path) -> None:
    guest = boot(Disk(serve(image).socket))
    guest.run("head -c 8388608 /dev/urandom >/tmp/data && dd if=/tmp/data of=/dev/vda bs=1M conv=fsync status=none")
    offset, length = 1_000_448, 3_000_320  # multiples of a sector, of nothing larger
    guest.run(f"blkdiscard -z -o {offset} -l {length} /dev/vda")
    guest.run(
        f"dd if=/dev/zero of=/tmp/data bs=512 seek={offset // 512} count={length // 512} conv=notrunc status=none && "
        "echo 3 >/proc/sys/vm/drop_caches && head -c 8388608 /dev/vda | cmp - /tmp/data"
    )
    with image.open("rb") as file:
        file.seek(offset)
        assert not any(file.read(length))
