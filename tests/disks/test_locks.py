"""Two programs never write one image: our locks, and those of QEMU's tools, against each other."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhostuser.disks import FileDisk, locks
from vhostuser.errors import OperatorError

QEMU_IMG = shutil.which("qemu-img")
DAEMON = shutil.which("qemu-storage-daemon")
SIZE = 1 << 20

qemu_img = pytest.mark.skipif(QEMU_IMG is None, reason="qemu-img is not installed")
daemon = pytest.mark.skipif(DAEMON is None, reason="qemu-storage-daemon is not installed")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def run_img(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert QEMU_IMG is not None
    return subprocess.run([QEMU_IMG, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_an_image_is_served_once(image: Path) -> None:
    with FileDisk(image), pytest.raises(OperatorError, match="another program"):
        FileDisk(image)
    FileDisk(image).close()


def test_a_writer_refuses_readers_and_readers_share(image: Path) -> None:
    with FileDisk(image), pytest.raises(OperatorError, match="another program"):
        FileDisk(image, read_only=True)
    reader = FileDisk(image, read_only=True)
    with reader, FileDisk(image, read_only=True), pytest.raises(OperatorError, match="another program"):
        FileDisk(image)


def test_without_locking_anything_goes(image: Path) -> None:
    with FileDisk(image), FileDisk(image, lock=False):
        pass


def test_a_refused_opening_leaves_no_lock(image: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(FileDisk(image))
        with pytest.raises(OperatorError):
            FileDisk(image)
        first.close()
    FileDisk(image).close()


def test_another_process_is_refused(image: Path) -> None:
    program = "import sys; from vhostuser.disks import FileDisk; FileDisk(sys.argv[1])"
    command = [sys.executable, "-c", program, str(image)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with FileDisk(image):
        found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert found.returncode != 0
        assert "another program" in found.stderr
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 0


COMMANDS = {
    "resize": lambda image, other: ("resize", "-f", "raw", image, "2M"),
    "convert from": lambda image, other: ("convert", "-f", "raw", "-O", "raw", image, other),
    "convert to": lambda image, other: ("convert", "-n", "-f", "raw", "-O", "raw", other, image),
    "bench": lambda image, other: ("bench", "-f", "raw", "-w", "-c", "1", image),
}


@qemu_img
@pytest.mark.parametrize("name", COMMANDS)
def test_qemu_img_is_refused_on_an_image_that_we_write(image: Path, name: str) -> None:
    other = image.with_name("other.img")
    other.write_bytes(bytes(SIZE))
    command = COMMANDS[name](image, other)
    assert run_img(*command).returncode == 0
    image.write_bytes(bytes(SIZE))
    with FileDisk(image):
        found = run_img(*command)
        assert found.returncode != 0
        assert "lock" in found.stderr
    assert image.stat().st_size == SIZE


@qemu_img
def test_qemu_img_info_needs_no_permission(image: Path) -> None:
    """QEMU's tools look at a raw image without taking a lock, on one that QEMU itself writes, too."""
    with FileDisk(image):
        assert run_img("info", "-f", "raw", image).returncode == 0


@qemu_img
def test_qemu_img_may_read_and_not_write_an_image_that_we_serve_read_only(image: Path) -> None:
    with FileDisk(image, read_only=True):
        assert run_img("info", "-f", "raw", image).returncode == 0
        assert run_img("resize", "-f", "raw", image, "2M").returncode != 0
        assert run_img("bench", "-f", "raw", "-w", "-c", "1", image).returncode != 0


@pytest.fixture
def storage_daemon(image: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """A storage daemon that has the image open; the parameter says whether it writes."""
    assert DAEMON is not None
    writes: bool = request.param
    theirs = image.with_name("qmp.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(theirs))
        listener.listen()
        listener.settimeout(60)
        options = {"driver": "file", "node-name": "f", "filename": str(image), "read-only": not writes}
        export = {"type": "vhost-user-blk", "id": "e", "node-name": "f", "writable": writes}
        export |= {"addr": {"type": "unix", "path": str(image.with_name("e.sock"))}}
        command = [DAEMON, "--blockdev", json.dumps(options), "--export", json.dumps(export)]
        command += ["--chardev", f"socket,id=c,path={theirs},server=off", "--monitor", "chardev=c"]
        process = subprocess.Popen(command)
        try:
            monitor, _ = listener.accept()
            with monitor:
                assert b"QMP" in monitor.recv(4096)
                yield
        finally:
            process.kill()
            process.wait()


@daemon
@pytest.mark.parametrize("storage_daemon", [True], indirect=True)
@pytest.mark.usefixtures("storage_daemon")
def test_we_refuse_an_image_that_a_storage_daemon_writes(image: Path) -> None:
    with pytest.raises(OperatorError, match="another program"):
        FileDisk(image)
    with pytest.raises(OperatorError, match="another program"):
        FileDisk(image, read_only=True)


@daemon
@pytest.mark.parametrize("storage_daemon", [False], indirect=True)
@pytest.mark.usefixtures("storage_daemon")
def test_we_may_read_an_image_that_a_storage_daemon_reads(image: Path) -> None:
    FileDisk(image, read_only=True).close()


def test_a_lock_that_its_holder_gives_up_in_time_is_waited_for_without_a_word(
    image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder = FileDisk(image)
    timer = threading.Timer(0.1, holder.close)
    timer.start()
    try:
        FileDisk(image).close()
    finally:
        timer.join()
    assert not caplog.records


def test_a_long_wait_is_one_line_that_says_what_for(
    image: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "QUIET_S", 0.05)
    with FileDisk(image), pytest.raises(OperatorError, match="another program"):
        FileDisk(image, lock_timeout_s=0.3)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{image}: waiting up to 0.3 s for it: another program lets nobody else have its write permission"


def test_who_has_no_patience_is_refused_at_once(image: Path) -> None:
    with FileDisk(image):
        begun = time.monotonic()
        with pytest.raises(OperatorError, match="another program"):
            FileDisk(image, lock_timeout_s=0)
        assert time.monotonic() - begun < locks.QUIET_S


def test_readers_of_one_place_follow_each_other_and_those_of_others_share(image: Path) -> None:
    with FileDisk(image, read_only=True, place="/run/a.sock"):
        FileDisk(image, read_only=True, place="/run/b.sock").close()
        FileDisk(image, read_only=True).close()
        with pytest.raises(OperatorError, match=r"another program serves it on /run/a\.sock"):
            FileDisk(image, read_only=True, place="/run/a.sock", lock_timeout_s=0)
    FileDisk(image, read_only=True, place="/run/a.sock").close()


@qemu_img
def test_a_reader_with_a_place_still_shares_with_qemu_img(image: Path) -> None:
    with FileDisk(image, read_only=True, place="/run/a.sock"):
        assert run_img("convert", "-f", "raw", "-O", "raw", image, image.with_name("copy.img")).returncode == 0


@pytest.mark.parametrize("read_only", [False, True])
def test_the_last_request_of_a_closed_disk_keeps_its_successor_out(image: Path, read_only: bool) -> None:
    """A request in the kernel holds the open file, for which a duplicate of the descriptor stands here."""
    disk = FileDisk(image, read_only=read_only, place="/run/a.sock")
    request = disk._fd.duplicate()
    disk.close()
    with pytest.raises(OperatorError, match="another program"):
        FileDisk(image, read_only=read_only, place="/run/a.sock", lock_timeout_s=0)
    request.close()
    FileDisk(image, read_only=read_only, place="/run/a.sock", lock_timeout_s=0).close()
