"""Rings of every form that a driver may ask for, each under a load that verifies itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB, blank
from tests.guest.machines import Disk
from tests.guest.test_features import attribute, features

pytestmark = pytest.mark.guest

INDIRECT, EVENT_IDX, VERSION_1 = 28, 29, 32
LOAD = "load --direct --threads=2 --largest=4M --seconds=4"


@dataclass(frozen=True)
class Form:
    """A form of ring; without indirect descriptors a request must fit the table: seg_max is its size less two."""

    size: int
    indirect: bool = True
    event_idx: bool = True

    @property
    def seg_max(self) -> int | None:
        """What the back-end must say, when it is not the default."""
        return None if self.indirect or self.size > 126 else self.size - 2


FORMS = [
    [
        Form(4),
        Form(8, event_idx=False),
        Form(16),
        Form(64),
        Form(128),
        Form(256),
        Form(1024),
        Form(128, event_idx=False),
    ],
    [
        Form(4, indirect=False),
        Form(8, indirect=False, event_idx=False),
        Form(16, indirect=False),
        Form(64, indirect=False, event_idx=False),
        Form(128, indirect=False),
        Form(128, indirect=False, event_idx=False),
        Form(256, indirect=False),
        Form(1024, indirect=False),
    ],
]


@pytest.mark.covers("VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_EVENT_IDX", "VIRTIO_BLK_F_SEG_MAX")
@pytest.mark.parametrize("forms", FORMS, ids=["indirect", "direct"])
def test_rings_of_every_size_and_form_lose_nothing(serve: Serve, boot: Boot, place: Path, forms: list[Form]) -> None:
    disks = []
    for number, form in enumerate(forms):
        words = {} if form.seg_max is None else {"seg_max": form.seg_max}
        backend = serve(blank(place / f"{number}.img", 16 * MIB), **words)
        options = {"queue-size": form.size, "indirect_desc": form.indirect, "event_idx": form.event_idx}
        disks.append(Disk(backend.socket, f"d{number}", options))
    guest = boot(*disks, memory_mib=512, cpus=2)
    names = [f"vd{chr(ord('a') + number)}" for number in range(len(forms))]
    for name, form in zip(names, forms, strict=True):
        assert (INDIRECT in features(guest, name)) == form.indirect
        assert (EVENT_IDX in features(guest, name)) == form.event_idx
        assert attribute(guest, name, "mq/0/nr_tags") == str(form.size if form.indirect else form.size // 2)
    for name in names:
        guest.run(f"({LOAD} /dev/{name}; echo status $?) >/tmp/{name} 2>&1 &")
    for name, form in zip(names, forms, strict=True):
        said = guest.run(f"until grep -q status /tmp/{name}; do usleep 50000; done; cat /tmp/{name}", 120)
        assert said.startswith("load: ok"), f"{form}: {said}"
        assert "status 0" in said


@pytest.mark.covers("VIRTIO_F_VERSION_1")
def test_a_virtio_09_device_is_served(serve: Serve, boot: Boot, image: Path) -> None:
    guest = boot(Disk(serve(image).socket, options={"disable-modern": True, "disable-legacy": False}))
    assert VERSION_1 not in features(guest, "vda")
    assert attribute(guest, "vda", "size") == str(64 * MIB // 512)
    said = guest.run("load --direct --discard --seconds=3 --largest=4M /dev/vda")
    assert said.startswith("load: ok"), said
    guest.run("mke2fs -q -t ext4 /dev/vda && mount /dev/vda /mnt && cp /bin/load /mnt && umount /mnt")
    guest.reset()
    guest.run("e2fsck -f -n /dev/vda && mount /dev/vda /mnt && cmp /bin/load /mnt/load")


def test_a_device_of_the_new_form_only_is_served(serve: Serve, boot: Boot, image: Path) -> None:
    options = {"disable-legacy": True, "page-per-vq": True}
    guest = boot(Disk(serve(image).socket, options=options))
    assert VERSION_1 in features(guest, "vda")
    said = guest.run("load --direct --discard --seconds=2 /dev/vda")
    assert said.startswith("load: ok"), said


def test_requests_from_one_block_to_16_mib_at_odd_offsets_on_two_disks_at_once(
    serve: Serve, boot: Boot, place: Path
) -> None:
    backends = [serve(blank(place / f"{number}.img", 160 * MIB)) for number in range(2)]
    guest = boot(
        *(Disk(backend.socket, f"d{number}") for number, backend in enumerate(backends)), memory_mib=640, cpus=2
    )
    for name in ("vda", "vdb"):
        queue = f"/sys/block/{name}/queue"
        guest.run(f"cat {queue}/max_hw_sectors_kb >{queue}/max_sectors_kb")
        odd = "--offset=1536 --size=150M --threads=2 --largest=16M --seconds=8"
        guest.run(f"(load --direct --discard {odd} /dev/{name}; echo status $?) >/tmp/{name} 2>&1 &")
    for name in ("vda", "vdb"):
        said = guest.run(f"until grep -q status /tmp/{name}; do usleep 50000; done; cat /tmp/{name}", 180)
        assert said.startswith("load: ok"), said
    said = guest.run("load --offset=512 --size=60M --threads=2 --largest=16M --seconds=4 /dev/vdb")  # page cache
    assert said.startswith("load: ok"), said
