"""The examples do what they say, driven through their sockets."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.backend.frontend import WAIT_S, Frontend, GuestRam, GuestRing

from vhostuser import BlockDevice, Server, connect, listen, open_disk

EXAMPLES = Path(__file__).parents[1] / "examples"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts an example with its arguments; killed at the latest when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def run(name: str, *arguments: str) -> subprocess.Popen[str]:
        words = [sys.executable, str(EXAMPLES / name), *arguments]
        environment = {**os.environ, "PYTHONWARNINGS": "error"}
        started.append(
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )
        return started[-1]

    yield run
    for process in started:
        with process:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_entropy_device_fills_what_a_guest_gives_it(start: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "rng.sock")
    process = start("entropy.py", path)
    assert line(process) == f"serving on {path}"
    with Frontend.connect(path) as peer:
        features = peer.negotiate()
        ram = GuestRam()
        ram.share(peer)
        ring = GuestRing(ram, 0, 8, features)
        ring.start(peer)
        view = memoryview(ram.arena)
        for _ in range(3):
            before = bytes(view[ram.scratch : ram.scratch + 4096])
            ring.submit([], [(ram.scratch, 1000), (ram.scratch + 2000, 96)])
            assert [written for _, written in ring.wait()] == [1096]
            after = bytes(view[ram.scratch : ram.scratch + 4096])
            assert after[:1000] != before[:1000]
            assert after[1000:2000] == before[1000:2000]
            assert after[2000:2096] != before[2000:2096]
            assert after[2096:] == before[2096:]
        ring.close()
    process.send_signal(signal.SIGINT)
    assert line(process) == "stopped"
    assert process.wait(WAIT_S) == 0


def test_the_growing_disk_grows(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    path = str(tmp_path / "disk.sock")
    process = start("growing_disk.py", str(image), path)
    assert line(process) == f"serving {1 << 20} bytes on {path}"
    assert process.stdin is not None
    for text, answer in (
        ("2M", f"{2 << 20} bytes: no guest is connected; the next one sees the change"),
        ("lots", "size 'lots': this is not a size. Write a number and K, M, G or T, like 10G."),
    ):
        process.stdin.write(f"{text}\n")
        process.stdin.flush()
        assert line(process).replace("\\n", "") == answer
    assert image.stat().st_size == 2 << 20
    process.stdin.close()
    assert line(process) == "the guest made 0 reads"
    assert process.wait(WAIT_S) == 0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """An image of 4 MiB that is served, and the socket."""
    image, path = tmp_path / "served.img", str(tmp_path / "served.sock")
    image.write_bytes(os.urandom(4 << 20))
    with open_disk(str(image)) as disk:
        device = BlockDevice(disk)
        with Server(device, listen(path)):
            yield image, path
        device.close()


def ended(process: subprocess.Popen[str]) -> str:
    """What it printed; it must end well."""
    said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    return said


@pytest.mark.parametrize("size", [0, 1, 512, (3 << 20) + 777, 4 << 20])
def test_the_copy_fills_the_last_block_with_zeroes(
    start: Start, served: tuple[Path, str], tmp_path: Path, size: int
) -> None:
    before, source = served[0].read_bytes(), tmp_path / "source"
    source.write_bytes(os.urandom(size))
    assert ended(start("copy_disk.py", str(source), served[1])) == f"{size} bytes copied\n"
    whole = source.read_bytes() + bytes(-size % 512)
    assert served[0].read_bytes() == whole + before[len(whole) :]


def test_the_checksum_is_that_of_the_image(start: Start, served: tuple[Path, str]) -> None:
    expected = hashlib.sha256(served[0].read_bytes()).hexdigest()
    assert ended(start("checksum.py", served[1])) == f"{expected} {served[1]}\n"


def test_the_latencies_count_every_read(start: Start, served: tuple[Path, str]) -> None:
    lines = ended(start("latencies.py", served[1], "300")).splitlines()
    found = [re.fullmatch(r"< +(\d+) µs +(\d+) (#*)", line) for line in lines]
    assert all(found)
    assert sum(int(one[2]) for one in found if one) == 300
    assert max(len(one[3]) for one in found if one) == 60


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short name: the path of a socket has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vhe-") as name:
        yield Path(name)


def test_the_pytest_fixture_tests_our_own_back_end_and_one_that_does_not_start(short: Path) -> None:
    program = f"{sys.executable} -m vhostuser.cli.main serve"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_my_backend.py")]

    def outcome(backend: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "BACKEND": backend}
        return subprocess.run(
            [*words, "--basetemp", str(short / "pytest")],
            env=environment, cwd=short, capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip

    assert "2 passed" in outcome(f"{program} {{image}} --socket {{socket}}").stdout
    assert "the back-end ended with exit code 2" in outcome(f"{program} {{image}} --no-such-option {{socket}}").stdout


def test_no_example_is_longer_than_60_lines() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path.name


def test_the_programs_of_the_tutorial_print_what_it_says(tmp_path: Path) -> None:
    text = (EXAMPLES.parent / "docs" / "drive" / "tutorial.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) >= 4
    path = str(tmp_path / "disk.sock")
    with open_disk("memory:size=64M") as disk:
        device = BlockDevice(disk)
        with Server(device, listen(path)):
            with connect(path) as client, client.file() as file:
                file.seek(4096)
                file.write(b"hello, disk\n")
            for program in programs:
                expected = "".join(f"{said}\n" for said in re.findall(r"print\(.*\) +# (.*)", program))
                words = [sys.executable, "-c", program.replace("/tmp/disk.sock", path)]
                done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S, check=False)
                assert (done.stdout, done.stderr) == (expected, "")
        device.close()
