"""What people get wrong with a real machine, and what they are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.guest.backends import Ours
from tests.guest.conftest import Boot, Serve
from tests.guest.images import bootable
from tests.guest.machines import Disk

pytestmark = pytest.mark.guest


def test_memory_that_is_not_shared_gets_its_own_hint(serve: Serve, boot: Boot, place: Path) -> None:
    image, _ = bootable(place / "boot.img")
    backend = serve(image)
    if not isinstance(backend, Ours):
        pytest.skip("only our back-end says so")
    boot(Disk(backend.socket, options={"bootindex": 1}), firmware_only=True, shared=False)
    backend.process.wait_output(r"share=on", 30)


def test_an_image_in_use_by_a_guest_is_refused_to_a_second_server(serve: Serve, boot: Boot, image: Path) -> None:
    backend = serve(image)
    guest = boot(Disk(backend.socket))
    guest.run("dd if=/dev/vda of=/dev/null bs=4096 count=1 status=none")
    with pytest.raises(AssertionError, match=r"lock|in use"):
        serve(image)
