"""The examples do what they say, driven through their sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.backend.frontend import WAIT_S, Frontend, GuestRam, GuestRing

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
