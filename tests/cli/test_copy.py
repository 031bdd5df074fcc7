"""`vhostuser read`, `write` and `copy` between processes, byte for byte."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tests.guest.backends import Export, StorageDaemon

from .conftest import WAIT_S, Run, Serving, command_line, environment
from .test_failures import assert_one_line

Start = Callable[..., Serving]
MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse file with data at its start, in its middle and at its very end."""
    path = tmp_path / "source.img"
    with path.open("wb") as file:
        file.write(os.urandom(100_000))
        file.seek(5 * MIB + 4096)
        file.write(os.urandom(2 * MIB))
        file.seek(SIZE - 512)
        file.write(os.urandom(512))
    return path


@pytest.fixture
def disk(serving: Start, tmp_path: Path) -> tuple[str, Path]:
    """A served image of 16 MiB: its socket and its file."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xa5" * SIZE)
    place = str(tmp_path / "d.sock")
    serving("serve", str(path), "--socket", place)
    return place, path


def piped(*arguments: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run with pipes for all three streams."""
    return subprocess.run(
        command_line("vhostuser", *arguments),
        env=environment(),
        input=data,
        capture_output=True,
        timeout=WAIT_S,
        check=False,
    )


def test_copy_to_a_disk_and_back_is_the_same_and_as_sparse(
    run: Run, image: Path, disk: tuple[str, Path], tmp_path: Path
) -> None:
    place, served = disk
    done = run("vhostuser", "copy", str(image), place, "--verify", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["bytes"], told["failures"], told["verified"], told["different"]) == (SIZE, [], True, [])
    assert told["data_bytes"] < 3 * MIB
    assert served.read_bytes() == image.read_bytes()
    back = tmp_path / "back.img"
    done = run("vhostuser", "copy", f"vhost:{place}", str(back), "--verify")
    assert done.returncode == 0
    assert "16777216 bytes, " in done.stdout
    assert "read back and found the same" in done.stdout
    assert back.read_bytes() == image.read_bytes()
    assert back.stat().st_blocks * 512 < 3 * MIB


@pytest.mark.skipif(not StorageDaemon.available(), reason="qemu-storage-daemon is not installed")
def test_copy_between_our_back_end_and_the_storage_daemon(
    run: Run, image: Path, disk: tuple[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(b"\x5a" * (SIZE + MIB))
    with StorageDaemon(other, tmp_path, Export()) as daemon:
        assert run("vhostuser", "copy", str(image), str(daemon.socket), "--verify").returncode == 0
        assert other.read_bytes() == image.read_bytes() + b"\x5a" * MIB
        done = run("vhostuser", "copy", str(daemon.socket), disk[0])
        assert_one_line(done, 2)
        assert "nothing was written" in done.stderr
        assert disk[1].read_bytes() == b"\xa5" * SIZE


def test_pipes_go_both_ways(image: Path, disk: tuple[str, Path]) -> None:
    data = image.read_bytes()[: 7 * MIB + 300]  # ends inside of a block
    done = piped("write", disk[0], "--verify", "--json", data=data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["bytes"] == len(data)
    assert disk[1].read_bytes() == data + b"\xa5" * (SIZE - len(data))
    assert piped("copy", disk[0], "-").stdout == disk[1].read_bytes()
    assert (
        piped("read", disk[0], "--offset", "5000001", "--length", "3M").stdout
        == (disk[1].read_bytes()[5000001 : 5000001 + 3 * MIB])
    )


def test_files_as_standard_streams_are_as_sparse(image: Path, disk: tuple[str, Path], tmp_path: Path) -> None:
    back = tmp_path / "back.img"
    with image.open("rb") as source, back.open("wb") as sink:
        words = command_line("vhostuser", "write", disk[0], "--offset", "0", "-q")
        subprocess.run(words, env=environment(), stdin=source, check=True, timeout=WAIT_S)
        words = command_line("vhostuser", "read", disk[0])
        subprocess.run(words, env=environment(), stdin=subprocess.DEVNULL, stdout=sink, check=True, timeout=WAIT_S)
    assert back.read_bytes() == image.read_bytes()
    assert back.stat().st_blocks * 512 < 3 * MIB


def test_writing_at_an_offset_leaves_the_rest_alone(disk: tuple[str, Path]) -> None:
    assert piped("write", disk[0], "--offset", "1M", data=b"x" * 1000).returncode == 0
    assert disk[1].read_bytes() == b"\xa5" * MIB + b"x" * 1000 + b"\xa5" * (SIZE - MIB - 1000)


def test_a_pipe_that_is_too_long_fails_when_the_disk_is_full(disk: tuple[str, Path]) -> None:
    done = piped("write", disk[0], data=bytes(SIZE + 1))
    assert done.returncode == 1
    assert b"standard input has more than the 16777216 bytes that it takes" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("copy", "{image}", "{image}"), "both what is copied and where to"),
        (("copy", "{disk}", "vhost:{disk}"), "both what is copied and where to"),
        (("copy", "{disk}", "-", "--verify"), "standard output: it cannot be read back"),
        (("copy", "{big}", "{disk}"), "it takes 16777216 bytes, and {big} has 16777217"),
        (("write", "{disk}", "--offset", "100"), "offset 100 lies inside of a block of 512 bytes"),
        (("write", "{disk}", "--offset", "17M"), "its disk ends at 16777216 bytes"),
        (("read", "{disk}", "--offset", "15M", "--length", "2M"), "its disk ends at 16777216 bytes"),
        (("read", "{disk}", "--offset", "much"), "this is not a size"),
    ],
)
def test_nonsense_is_refused_and_nothing_is_written(
    image: Path, disk: tuple[str, Path], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    big = tmp_path / "big.img"
    big.touch()
    os.truncate(big, SIZE + 1)
    names = {"image": str(image), "disk": disk[0], "big": str(big)}
    done = piped(*(word.format(**names) for word in arguments), data=b"")
    assert_one_line(
        subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode()), 2
    )
    assert said.format(**names) in done.stderr.decode()
    assert disk[1].read_bytes() == b"\xa5" * SIZE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("copy", "{served}", "x.img"), "another program has it open"),
        (("copy", "x.sock", "{served}"), "x.sock: no such file"),
        (("copy", "{disk}", "{directory}"), "is a directory"),
        (("copy", "{disk}", "{directory}/none/x"), "no such file"),
        (("read", "{directory}/x.sock"), "there is no such socket"),
        (("copy", "{disk}", "/dev/null"), "neither a file nor a block device"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    run: Run, disk: tuple[str, Path], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    names = {"disk": disk[0], "served": str(disk[1]), "directory": str(tmp_path)}
    done = run("vhostuser", *(word.format(**names) for word in arguments))
    assert_one_line(done, 1)
    assert said in done.stderr


def test_a_disk_served_read_only_is_not_written(run: Run, serving: Start, image: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "ro.sock")
    serving("serve", "null:size=1G", "--read-only", "--socket", place)
    done = run("vhostuser", "copy", str(image), place)
    assert_one_line(done, 2)
    assert "its disk is read-only" in done.stderr


def test_what_storage_fails_to_read_is_named_with_its_offset(run: Run, serving: Start, tmp_path: Path) -> None:
    place = str(tmp_path / "bad.sock")
    serving("serve", "memory:size=8M", "--inject", "error-read=100%", "--socket", place)
    done = run("vhostuser", "copy", place, str(tmp_path / "x.img"))
    assert_one_line(done, 1)
    assert f"vhostuser: {place}: IN at sector 0 failed with status IOERR: " in done.stderr
    assert " bytes at 0 could not be read. It gave up there." in done.stderr


def test_a_disk_that_forgets_is_found_out_by_verifying(run: Run, serving: Start, image: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "null.sock")
    serving("serve", "null:size=16M", "--socket", place)
    done = run("vhostuser", "copy", str(image), place, "--verify", "-q")
    assert_one_line(done, 1)
    assert f"{place}: it does not hold what was copied from {image}: " in done.stderr
    assert re.search(r"\d+ bytes at \d+", done.stderr)


def test_a_back_end_that_goes_away_in_the_middle_is_named(serving: Start, tmp_path: Path) -> None:
    place = str(tmp_path / "gone.sock")
    served = serving("serve", "memory:size=64M", "--socket", place)
    words = command_line("vhostuser", "write", place)
    ours, theirs = os.pipe()
    with (
        open(ours, "rb") as source,
        open(theirs, "wb", buffering=0) as sink,
        subprocess.Popen(words, env=environment(), stdin=source, stderr=subprocess.PIPE) as process,
    ):
        source.close()
        assert process.stderr is not None
        sent = 0
        while sent < 4 * MIB:  # more than the pipe holds: it is connected and writes now
            sent += sink.write(os.urandom(MIB)) or 0
        served.kill()
        with suppress(BrokenPipeError):
            while sent < 63 * MIB:
                sent += sink.write(os.urandom(MIB)) or 0
        sink.close()
        said = process.stderr.read().decode()
        assert process.wait(WAIT_S) == 1
    assert said.startswith(f"vhostuser: {place}: ")
    assert said.count("\n") == 1
    assert "; it was at " in said


def test_a_bar_is_shown_on_a_terminal_only(image: Path, disk: tuple[str, Path]) -> None:
    ours, theirs = os.openpty()
    words = command_line("vhostuser", "copy", str(image), disk[0])
    process = subprocess.Popen(
        words,
        env={**environment(), "TERM": "xterm", "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(WAIT_S) == 0
    assert b"copying" in shown
    assert b"16.0/16.0 MiB" in shown
