"""Our client against back-ends as programs: images byte for byte, and whatever they do not offer done without."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from tests.guest.backends import Export
from tests.guest.prepare import OFFERS, Qemu
from tests.peers.conftest import SIZE, Serve
from tests.peers.daemons import NAMES, RustVmm, Unavailable, rust_vmm_program

import vhostuser
from vhostuser.blk.requests import Read, Write
from vhostuser.errors import BackendUnfit, OperatorError
from vhostuser.protocol import ProtocolFeature
from vhostuser.virtio.blk import BlkFeature

PEERS: Final = [pytest.param(name, marks=[] if name == "ours" else pytest.mark.interop) for name in NAMES]
CHUNK: Final = 256 << 10


def identical(one: Path, other: Path) -> bool:
    """Whether two images hold the same bytes; ``qemu-img`` must say so too, where there is one."""
    command = [shutil.which("qemu-img") or ""]
    if not command[0] and OFFERS["sid"].ready():
        command = OFFERS["sid"].fetch().command("qemu-img")
    same = filecmp.cmp(one, other, shallow=False)
    if command[0]:
        words = ["compare", "-f", "raw", "-F", "raw", str(one), str(other)]
        environment = {**os.environ, **Qemu((0, 0)).environment()}
        done = subprocess.run([*command, *words], check=False, capture_output=True, env=environment)
        assert (done.returncode == 0) is same, done
    return same


@pytest.mark.parametrize("name", PEERS)
def test_an_image_comes_out_of_a_back_end_byte_for_byte(name: str, serve: Serve, image: Path, place: Path) -> None:
    copy = place / "copy.img"
    with vhostuser.connect(serve(name, image, queues=2).socket, queues=2) as disk, copy.open("wb") as output:
        futures = disk.submit_all(Read(offset, CHUNK) for offset in range(0, disk.size, CHUNK))
        for future in futures:
            output.write(future.result(60))
    assert identical(image, copy)


@pytest.mark.parametrize("name", PEERS)
def test_an_image_goes_into_a_back_end_byte_for_byte(name: str, serve: Serve, image: Path, place: Path) -> None:
    source, target = place / "source.img", image
    source.write_bytes(os.urandom(SIZE))
    backend = serve(name, target, queues=2)
    with vhostuser.connect(backend.socket, queues=2) as disk:
        data = memoryview(source.read_bytes())
        parts = (Write(offset, data[offset : offset + CHUNK]) for offset in range(0, disk.size, CHUNK))
        for future in disk.submit_all(parts):
            future.result(60)
        if disk.features & BlkFeature.WRITE_ZEROES:
            disk.write_zeroes(1 << 20, 1 << 20, unmap=True)
            with source.open("r+b") as file:
                file.seek(1 << 20)
                file.write(bytes(1 << 20))
        disk.flush()
    backend.stop()
    assert identical(source, target)


@pytest.mark.parametrize("name", PEERS)
def test_zero_copy_buffers_hold_what_the_disk_holds(name: str, serve: Serve, image: Path) -> None:
    content = image.read_bytes()
    with vhostuser.connect(serve(name, image).socket) as disk, disk.allocate(1 << 20) as buffer:
        disk.readinto(3 << 20, buffer)
        assert bytes(buffer.view) == content[3 << 20 : 4 << 20]
        disk.write(0, buffer[4096:8192])
        assert disk.copied_bytes == 0
        assert disk.read(0, 8192) == content[(3 << 20) + 4096 : (3 << 20) + 8192] + content[4096:8192]
        assert disk.copied_bytes == 8192


@pytest.mark.parametrize("name", PEERS)
def test_the_write_cache_is_switched_where_a_disk_lets_it(name: str, serve: Serve, image: Path) -> None:
    with vhostuser.connect(serve(name, image).socket) as disk:
        assert disk.features & BlkFeature.CONFIG_WCE
        for enabled in (False, True, False):
            disk.set_write_cache(enabled)
            assert disk.write_cache is enabled
            disk.write(0, b"\x44" * 512)
        assert disk.read(0, 512) == b"\x44" * 512


@pytest.mark.parametrize("name", PEERS)
def test_more_queues_than_a_back_end_has_are_refused_with_the_reason(name: str, serve: Serve, image: Path) -> None:
    backend = serve(name, image, queues=2)
    with pytest.raises(BackendUnfit, match="2 queues and 3 were asked for"):
        vhostuser.connect(backend.socket, queues=3)
    with vhostuser.connect(backend.socket, queues=2) as disk:
        disk.write(0, b"\x45" * 512)


LEFT_OUT: Final = {
    "mem-slots": ProtocolFeature.CONFIGURE_MEM_SLOTS,
    "mq": ProtocolFeature.MQ,
}


@pytest.mark.interop
@pytest.mark.parametrize("without", [("mem-slots",), ("mq",), tuple(LEFT_OUT)])
def test_a_back_end_of_the_crates_is_driven_without(
    without: tuple[str, ...], image: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        rust_vmm_program()
    except Unavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(RustVmm, "without", without)
    content = image.read_bytes()
    with RustVmm(image, place, Export()) as backend, vhostuser.connect(backend.socket) as disk:
        for name, feature in LEFT_OUT.items():
            assert (feature in disk.protocol_features) is (name not in without)
        assert disk.read(0, SIZE) == content
        disk.write(4096, content[:4096])
        assert disk.read(4096, 4096) == content[:4096]


@pytest.mark.parametrize("name", PEERS)
def test_a_back_end_that_went_away_is_nobody_there(name: str, serve: Serve, image: Path) -> None:
    backend = serve(name, image)
    with ExitStack() as stack:
        stack.enter_context(vhostuser.connect(backend.socket)).write(0, b"\x46" * 512)
    backend.stop()
    with pytest.raises(OperatorError):
        vhostuser.connect(backend.socket, timeout_s=1)
