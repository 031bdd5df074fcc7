"""`probe`, `copy --verify` and `bench` against other people's back-ends; what was copied is compared by `qemu-img`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.guest.backends import Backend, Export
from tests.guest.images import MIB, noise
from tests.peers.daemons import NAMES, Unavailable, starter

pytestmark = pytest.mark.interop

LIMIT_S = 120.0
SIZE = 24 * MIB


@pytest.fixture(params=NAMES)
def peer(request: pytest.FixtureRequest, place: Path) -> Iterator[tuple[str, Backend]]:
    """A back-end with two queues and a disk that is full of ones."""
    image = place / "peer.img"
    image.write_bytes(b"\xff" * SIZE)
    try:
        start = starter(request.param)
    except Unavailable as error:
        pytest.skip(str(error))
    with start(image, place, Export(queues=2)) as backend:
        yield request.param, backend


def command(*words: str) -> dict[str, object]:
    """Run a command of ours that succeeds, and return the object that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "vhostuser.cli.main", *words, "--json"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=LIMIT_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    return told


def assert_same(first: Path, second: Path) -> None:
    """By `qemu-img`, where it is installed, and by the bytes."""
    if shutil.which("qemu-img"):
        words = ["qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", str(first), str(second)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        assert "Images are identical" in done.stdout, done
    assert first.read_bytes() == second.read_bytes()


def test_probe_tells_size_and_queues_and_who_can_use_it(peer: tuple[str, Backend]) -> None:
    name, backend = peer
    told = command("probe", str(backend.socket))
    config, hosts = told["config"], told["hosts"]
    assert isinstance(config, dict)
    assert isinstance(hosts, list)
    assert config["capacity"] == SIZE // 512
    assert told["num_queues"] == 2
    able = {one["name"]: one["able"] for one in hosts}
    assert able["QEMU"]
    assert able["Cloud Hypervisor"]
    assert able["SPDK"] is (name == "ours"), "the others do not answer for 256 bytes of configuration"


def test_copies_there_and_back_are_byte_for_byte_the_same(peer: tuple[str, Backend], place: Path) -> None:
    _, backend = peer
    source, back = noise(place / "source.img", SIZE), place / "back.img"
    with source.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(bytes(9 * MIB))
    for words in ((str(source), str(backend.socket)), (str(backend.socket), str(back))):
        told = command("copy", *words, "--verify")
        assert (told["bytes"], told["verified"], told["different"], told["failures"]) == (SIZE, True, [], [])
        assert told["data_bytes"] == SIZE - 9 * MIB
    assert_same(source, Path(backend.image))
    assert_same(source, back)


@pytest.mark.parametrize("sleeping", [False, True], ids=["polling", "sleeping"])
def test_bench_finds_everything_that_it_wrote(peer: tuple[str, Backend], sleeping: bool) -> None:
    _, backend = peer
    words = ["--pattern", "randrw", "--verify", "--destroy-data", "--queues", "2", "--time", "0.5"]
    told = command("bench", str(backend.socket), *words, *(["--sleeping"] if sleeping else []))
    assert (told["errors"], told["mismatches"]) == (0, 0)
    assert isinstance(told["requests"], int)
    assert told["requests"] > 100
