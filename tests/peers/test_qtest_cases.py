"""QEMU's own tests of a virtio disk, over our front-end, for our back-end and for others; see `tests.peers.cases`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.guest.backends import Backend, Export
from tests.peers.cases import CASES, QUEUES
from tests.peers.conftest import SIZE, Serve
from tests.peers.daemons import NAMES, PreparedDaemon, Unavailable, starter
from tests.peers.raw import EVERYTHING, RawDisk
from tests.peers.table import EXPECTED, ONE_QUEUE, SECOND_EXPORT, missing, page

from vhostuser.errors import VhostUserError
from vhostuser.virtio.blk import BlkFeature

PEERS = [pytest.param(name, marks=[] if name == "ours" else pytest.mark.interop) for name in NAMES]
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "peers.md"


@pytest.fixture(scope="module", params=PEERS)
def peer(request: pytest.FixtureRequest) -> Iterator[tuple[str, Backend]]:
    """A back-end with eight queues that serves all cases, one connection after the other."""
    place = Path(tempfile.mkdtemp(prefix="vhp-"))
    image = place / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    try:
        start = starter(request.param)
    except Unavailable as error:
        pytest.skip(str(error))
    with start(image, place, Export(queues=QUEUES)) as backend:
        yield request.param, backend
    shutil.rmtree(place)


@pytest.mark.parametrize("case", CASES)
def test_a_case_of_qtest_ends_as_the_table_says(peer: tuple[str, Backend], case: str) -> None:
    name, backend = peer
    assert CASES[case](backend.socket) == EXPECTED[case][name]


@pytest.mark.parametrize("name", PEERS)
def test_a_driver_without_mq_uses_the_one_queue(name: str, serve: Serve, image: Path) -> None:
    with RawDisk(serve(name, image, queues=1).socket, features=EVERYTHING & ~int(BlkFeature.MQ)) as disk:
        disk.write(7, b"\x17" * 512)
        assert disk.read(7, 512) == b"\x17" * 512
        assert disk.device.max_queues == 1
        offered = "MQ was offered" if disk.device.features_offered & BlkFeature.MQ else "MQ was not offered"
    assert EXPECTED[ONE_QUEUE][name] == f"OK, {offered}"


@pytest.mark.parametrize("name", PEERS)
def test_a_second_export_comes_and_goes_while_the_first_is_used(
    name: str, serve: Serve, image: Path, place: Path
) -> None:
    first = serve(name, image, queues=1)
    other = place / "other.img"
    other.write_bytes(bytes(1 << 20))
    with RawDisk(first.socket) as disk:
        for mark in (b"\x21", b"\x22"):
            if isinstance(first, PreparedDaemon):
                socket = first.export_another(other)
            else:
                second = serve(name, other, queues=1)
                socket = second.socket
            with RawDisk(socket) as added:
                assert added.config.capacity == 2048
                added.write(3, mark * 512)
                disk.write(3, mark * 1024)
                assert added.read(3, 1024) == mark * 512 + bytes(512)
            if isinstance(first, PreparedDaemon):
                first.withdraw_another()
            else:
                second.stop()
            with pytest.raises(VhostUserError):
                RawDisk(socket)
            assert disk.read(3, 1024) == mark * 1024
            assert other.read_bytes()[3 * 512 : 5 * 512] == mark * 512 + bytes(512)
    assert EXPECTED[SECOND_EXPORT][name] == "OK"


def test_the_page_on_peers_is_the_table_that_the_tests_assert() -> None:
    assert not missing()
    assert PAGE.read_text() == page(), f"run `python -m tests.peers.table {PAGE.relative_to(Path.cwd())}`"
