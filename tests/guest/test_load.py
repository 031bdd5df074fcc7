"""The self-verifying load itself, on the host: every kind of damage that it is there to find, it finds."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.guest.images import MIB, blank
from tests.guest.prepare import Machine
from tests.guest.processes import Child
from tests.guest.sweeps import REPORT

BLOCK = 512
SIZE = 4 * MIB


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file to load."""
    return blank(tmp_path / "target", SIZE)


def swept(load: Path, target: Path, floors: list[int], rounds: int) -> list[int]:
    """Sweep ``target`` until every thread reported ``rounds`` more rounds, kill the load, return what was reported."""
    report = target.with_suffix(".report")
    report.write_text("")
    words = ["--sweep", f"--from={','.join(map(str, floors))}", f"--report={report}", "--largest=64K", str(target)]
    process = subprocess.Popen([str(load), *words, "--seconds=60"])
    try:
        while any(report.read_text().count(f"thread {thread} ") < rounds for thread in range(len(floors))):
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    reached = list(floors)
    for thread, number, _ in REPORT.findall(report.read_text()):
        reached[int(thread)] = max(reached[int(thread)], int(number))
    return reached


def checked(load: Path, target: Path, floors: list[int]) -> subprocess.CompletedProcess[str]:
    """What the check says about ``target``."""
    words = [str(load), f"--check={','.join(map(str, floors))}", str(target)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def swap(content: bytearray, _old: bytes) -> None:
    """Two blocks written to each other's places."""
    content[0:BLOCK], content[8 * BLOCK : 9 * BLOCK] = content[8 * BLOCK : 9 * BLOCK], content[0:BLOCK]


def lose(content: bytearray, old: bytes) -> None:
    """A write that was reported and is not there: the block of an earlier round."""
    content[8 * BLOCK : 9 * BLOCK] = old[8 * BLOCK : 9 * BLOCK]


def tear(content: bytearray, old: bytes) -> None:
    """Half a block of an earlier round."""
    content[8 * BLOCK + BLOCK // 2 : 9 * BLOCK] = old[8 * BLOCK + BLOCK // 2 : 9 * BLOCK]


def wipe(content: bytearray, _old: bytes) -> None:
    """A block of zeroes."""
    content[8 * BLOCK : 9 * BLOCK] = bytes(BLOCK)


def flip(content: bytearray, _old: bytes) -> None:
    """One bit."""
    content[8 * BLOCK + 400] ^= 4


@pytest.mark.parametrize("damage", [swap, lose, tear, wipe, flip])
def test_the_check_accepts_what_was_reported_and_finds_one_damaged_block(
    machine: Machine, target: Path, damage: Callable[[bytearray, bytes], None]
) -> None:
    floors = swept(machine.load, target, [0, 0], 1)
    old = target.read_bytes()
    floors = swept(machine.load, target, floors, 5)
    good = checked(machine.load, target, floors)
    assert good.returncode == 0, good.stdout
    assert good.stdout.startswith("load: ok")
    content = bytearray(target.read_bytes())
    damage(content, old)
    target.write_bytes(content)
    bad = checked(machine.load, target, floors)
    assert bad.returncode == 1, bad.stdout
    assert "load: MISMATCH block 8 (byte 4096)" in bad.stdout
    assert re.search(r"^load: WRONG .* mismatches=[12]$", bad.stdout, re.MULTILINE)


def test_the_random_load_finds_a_block_changed_behind_its_back(machine: Machine, target: Path, tmp_path: Path) -> None:
    log = tmp_path / "load.log"
    with Child("load", [str(machine.load), "--threads=2", "--largest=4K", str(target)], log) as child:
        while target.read_bytes()[:8] == bytes(8):
            assert child.alive
        child.signal(signal.SIGSTOP)
        content = bytearray(target.read_bytes())
        written = [at for at in range(0, SIZE, BLOCK) if any(content[at : at + 8])]
        for at in written:
            content[at + 300] ^= 1
        target.write_bytes(content)
        child.signal(signal.SIGTERM)
        child.signal(signal.SIGCONT)
        assert child.wait(30) == 1
    said = log.read_text()
    assert "load: MISMATCH" in said
    assert re.search(r"^load: WRONG ", said, re.MULTILINE)


def test_the_random_load_is_content_with_a_file_that_nobody_else_touches(machine: Machine, target: Path) -> None:
    words = [str(machine.load), "--threads=3", "--seconds=0.5", "--largest=1M", str(target)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.match(r"load: ok .* errors=0 mismatches=0$", done.stdout)
