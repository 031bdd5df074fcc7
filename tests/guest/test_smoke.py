"""One short boot with each QEMU that is here: the part of the guest tests that belongs to every run of the tests."""

from __future__ import annotations

import random
from pathlib import Path

from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB, digest
from tests.guest.machines import Disk


def test_a_guest_and_the_host_read_what_the_other_wrote(serve: Serve, boot: Boot, image: Path) -> None:
    with image.open("r+b") as file:
        file.write(random.Random(7).randbytes(MIB))
    guest = boot(Disk(serve(image).socket))
    assert guest.run("blockdev --getsize64 /dev/vda").strip() == str(64 * MIB)
    assert guest.run("head -c 1048576 /dev/vda | sha256sum").split()[0] == digest(image, 0, MIB)
    written = guest.run(
        "head -c 3145728 /dev/urandom >/tmp/data && sha256sum /tmp/data && "
        "dd if=/tmp/data of=/dev/vda bs=1M seek=32 conv=fsync status=none"
    )
    assert written.split()[0] == digest(image, 32 * MIB, 3 * MIB)
    said = guest.run("load --direct --offset=40M --size=16M --threads=2 --seconds=1 /dev/vda")
    assert said.startswith("load: ok"), said
