"""A write cache that a guest has switched off stays off behind another back-end: nobody tells that one of it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.backend.frontend import Frontend

from vhostuser.backend import Server
from vhostuser.backend.inflight import KEEPSAKE_BYTES, KEEPSAKE_HEAD, KEEPSAKE_MARK
from vhostuser.backend.session import Session
from vhostuser.blk import BlockDevice
from vhostuser.disks import FileDisk, MemoryDisk
from vhostuser.fds import Fd
from vhostuser.protocol import FrontendRequest, Inflight
from vhostuser.protocol.payloads import Config
from vhostuser.transport import Transport, listen

Req = FrontendRequest
WRITEBACK = 32


class Backends:
    """One back-end after another on one image, and the region that a front-end keeps."""

    def __init__(self, tmp_path: Path, stack: ExitStack) -> None:
        self.image = tmp_path / "disk.img"
        self.image.write_bytes(bytes(1 << 20))
        self.where = str(tmp_path / "disk.sock")
        self.stack = stack
        self.region: tuple[Inflight, Fd] | None = None

    @contextmanager
    def connected(self, *, cache: str = "writeback") -> Iterator[tuple[Frontend, BlockDevice]]:
        """A new back-end, and a connection to it with the region there was, or with a new one."""
        with FileDisk(str(self.image), cache=cache) as disk:
            device = BlockDevice(disk)
            with Server(device, listen(self.where)), Frontend.connect(self.where) as peer:
                peer.negotiate()
                if self.region is None:
                    self.region = self.asked(peer)
                told, fd = self.region
                peer.do(Req.SET_INFLIGHT_FD, told, [fd.fileno()])
                yield peer, device
            device.close()

    def asked(self, peer: Frontend) -> tuple[Inflight, Fd]:
        told = peer.ask(Req.GET_INFLIGHT_FD, Inflight(0, 0, 1, 128))
        assert isinstance(told, Inflight)
        (fd,) = peer.fds
        return told, self.stack.enter_context(fd)

    def spare(self) -> tuple[int, int]:
        """The region's descriptor, and where its spare bytes begin."""
        assert self.region is not None
        told, fd = self.region
        return fd.fileno(), told.mmap_size - KEEPSAKE_BYTES


@pytest.fixture
def backends(tmp_path: Path) -> Iterator[Backends]:
    with ExitStack() as stack:
        yield Backends(tmp_path, stack)


def test_the_region_goes_with_its_connection() -> None:
    """Not when Python comes to collect what is left of the session. Found by the fuzzer of the session."""
    ours, theirs = socket.socketpair()
    with MemoryDisk(1 << 20) as disk:
        device = BlockDevice(disk)
        session = Session(device, Transport(theirs))
        thread = threading.Thread(target=session.run)
        thread.start()
        with Frontend(ours) as peer:
            peer.negotiate()
            told = peer.ask(Req.GET_INFLIGHT_FD, Inflight(0, 0, 1, 128))
            assert isinstance(told, Inflight)
            with peer.fds[0], open(os.memfd_create("kept-here"), "w+b") as region:
                os.ftruncate(region.fileno(), told.mmap_size)
                peer.do(Req.SET_INFLIGHT_FD, told, [region.fileno()])
            switch(peer, False)
            assert any("kept-here" in name for name in open_files())
        thread.join()
        assert not any("kept-here" in name for name in open_files())
        assert not session.open
        device.close()


def open_files() -> list[str]:
    fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [os.readlink(fd) for fd in fds if os.path.islink(fd)]


def switch(peer: Frontend, on: bool) -> None:
    peer.do(Req.SET_CONFIG, Config(WRITEBACK, 1, 0, bytes([on])))


def test_the_successor_finds_it_off_and_tells_the_driver_so(backends: Backends) -> None:
    with backends.connected() as (peer, device):
        assert device.writeback
        switch(peer, False)
    with backends.connected() as (peer, device):
        assert not device.writeback
        assert peer.config(1, WRITEBACK) == b"\0"


def test_switched_on_again_it_is_on_behind_the_successor(backends: Backends) -> None:
    with backends.connected() as (peer, _):
        switch(peer, False)
    with backends.connected() as (peer, device):
        switch(peer, True)
        assert device.writeback
    with backends.connected() as (_, device):
        assert device.writeback


def test_a_cache_that_was_off_from_the_beginning_counts_as_well(backends: Backends) -> None:
    with backends.connected(cache="writethrough"):
        pass
    with backends.connected() as (_, device):
        assert not device.writeback


def test_it_is_still_known_when_the_driver_was_reset_and_has_another_region(backends: Backends) -> None:
    """QEMU frees the region at a reset, and goes on to show its guest the byte it knows."""
    with backends.connected() as (peer, device):
        switch(peer, False)
        peer.do(Req.RESET_DEVICE)
        backends.region = backends.asked(peer)
        told, fd = backends.region
        peer.do(Req.SET_INFLIGHT_FD, told, [fd.fileno()])
        assert not device.writeback
    with backends.connected() as (_, device):
        assert not device.writeback


@pytest.mark.parametrize(
    "record",
    [
        KEEPSAKE_HEAD.pack(KEEPSAKE_MARK, 2, 1) + b"\2",
        KEEPSAKE_HEAD.pack(KEEPSAKE_MARK, 2, 2) + b"\0\0",
        KEEPSAKE_HEAD.pack(KEEPSAKE_MARK, 2, 0xFFFF_FFFF) + b"\0",
        KEEPSAKE_HEAD.pack(KEEPSAKE_MARK, 1, 1) + b"\0",
        KEEPSAKE_HEAD.pack(b"another's", 2, 1) + b"\0",
    ],
    ids=["value", "longer", "too long", "of a network card", "somebody else's"],
)
def test_what_makes_no_sense_there_is_ignored(backends: Backends, record: bytes) -> None:
    with backends.connected():
        pass
    fd, place = backends.spare()
    os.pwrite(fd, record.ljust(KEEPSAKE_BYTES, b"\0"), place)
    with backends.connected() as (_, device):
        assert device.writeback


def test_a_region_of_another_make_has_no_room_for_it_and_is_left_alone(backends: Backends) -> None:
    with backends.connected():
        pass
    assert backends.region is not None
    told, fd = backends.region
    backends.region = Inflight(told.mmap_size - KEEPSAKE_BYTES, 0, told.num_queues, told.queue_size), fd
    os.pwrite(fd.fileno(), bytes(KEEPSAKE_BYTES), backends.spare()[1] + KEEPSAKE_BYTES)
    with backends.connected() as (peer, _):
        switch(peer, False)
        assert os.pread(fd.fileno(), KEEPSAKE_BYTES, backends.spare()[1] + KEEPSAKE_BYTES) == bytes(KEEPSAKE_BYTES)
    with backends.connected() as (_, device):
        assert device.writeback
