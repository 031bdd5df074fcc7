"""`vhostuser bench` against our back-end, and what it prints. Speed is not judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.guest.backends import Export, StorageDaemon

from .conftest import Run, Serving
from .test_failures import assert_one_line

Start = Callable[..., Serving]
SHORT = ("--time", "0.05")


@pytest.fixture
def memory(serving: Start, tmp_path: Path) -> str:
    """The socket of a disk in memory, with two queues."""
    place = str(tmp_path / "m.sock")
    serving("serve", "memory:size=16M", "--socket", place, "--queues", "2")
    return place


@pytest.mark.parametrize(
    "arguments",
    [
        ("--pattern", "read", "--block-size", "64K"),
        ("--pattern", "randread", "--sleeping"),
        ("--pattern", "write", "--destroy-data", "--flush-every", "7"),
        ("--pattern", "randwrite", "--destroy-data", "--queues", "2", "--depth", "3"),
        ("--pattern", "randrw", "--destroy-data", "--verify", "--read-share", "0.7", "--span", "1M"),
        ("--pattern", "randrw", "--destroy-data", "--depth", "256", "--block-size", "512"),
    ],
)
def test_every_kind_of_load_is_measured(run: Run, memory: str, arguments: tuple[str, ...]) -> None:
    done = run("vhostuser", "bench", memory, "--json", *SHORT, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["requests"] > 0
    assert told["iops"] == pytest.approx(told["requests"] / told["seconds"])
    assert told["bytes_per_s"] == pytest.approx(told["iops"] * told["block_size"])
    kinds = set(told["latency_us"])
    expected = {"read": {"reads"}, "write": {"writes"}, "randrw": {"reads", "writes"}}
    pattern = told["pattern"]
    assert kinds - {"flushes"} == expected.get(pattern, expected.get(pattern.removeprefix("rand"), set()))
    assert ("flushes" in kinds) == ("--flush-every" in arguments)
    for times in told["latency_us"].values():
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] <= times["p99.9"] <= times["p99.99"] <= times["max"]
    assert sum(told["latency_us"][kind]["count"] for kind in kinds - {"flushes"}) == told["requests"]
    assert (told["errors"], told["mismatches"]) == (0, 0)
    assert told["client_cpu_us"] > 0
    assert told["backend_cpu_us"] > 0


def test_a_person_gets_a_table(run: Run, memory: str) -> None:
    said = run("vhostuser", "bench", memory, *SHORT).stdout
    for text in ("requests/s", "MB/s", "p99.99", "reads", "processor time per request", "in the back-end"):
        assert text in said
    assert "…" not in said


def test_two_back_ends_alternate_and_ratios_have_intervals(
    run: Run, serving: Start, memory: str, tmp_path: Path
) -> None:
    slow = str(tmp_path / "slow.sock")
    serving("serve", "memory:size=16M", "--socket", slow, "--inject", "delay-read=2ms")
    done = run("vhostuser", "bench", memory, "--compare", slow, "--pairs", "6", "--time", "0.03", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["a"], told["b"], told["pairs"], len(told["runs"])) == (memory, slow, 6, 6)
    iops, p50 = told["compared"]["iops"]["ratio"], told["compared"]["p50_us"]["ratio"]
    # One pair of six may be disturbed by whatever else the machine does, so the ends of the intervals prove nothing.
    assert iops["low"] <= iops["median"] <= iops["high"]
    assert iops["median"] < 1 < p50["median"]
    assert p50["low"] <= p50["median"] <= p50["high"]
    assert iops["coverage"] == pytest.approx(1 - 2 / 2**6)
    said = run("vhostuser", "bench", memory, "--compare", slow, "--pairs", "2", "--time", "0.03").stdout
    assert "B/A, median" in said
    assert "50.0% probability" in said


@pytest.mark.skipif(not StorageDaemon.available(), reason="qemu-storage-daemon is not installed")
def test_the_storage_daemon_is_measured(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "d.img"
    image.write_bytes(bytes(1 << 20))
    with StorageDaemon(image, tmp_path, Export()) as daemon:
        words = ("--pattern", "randrw", "--verify", "--destroy-data", "--json", *SHORT)
        told = json.loads(run("vhostuser", "bench", str(daemon.socket), *words).stdout)
    assert told["requests"] > 0
    assert (told["errors"], told["mismatches"]) == (0, 0)


def test_a_disk_that_forgets_is_found_out(run: Run, serving: Start, tmp_path: Path) -> None:
    place = str(tmp_path / "n.sock")
    serving("serve", "null:size=1M", "--socket", place)
    done = run("vhostuser", "bench", place, "--pattern", "randrw", "--verify", "--destroy-data", *SHORT)
    assert done.returncode == 1
    assert "reads brought something else than what was written, the first at " in done.stderr
    assert "requests/s" in done.stdout


def test_failing_requests_are_counted_and_told(run: Run, serving: Start, tmp_path: Path) -> None:
    place = str(tmp_path / "b.sock")
    serving("serve", "memory:size=1M", "--socket", place, "--inject", "error-read=50%")
    done = run("vhostuser", "bench", place, "--json", *SHORT)
    told = json.loads(done.stdout)
    assert 0 < told["errors"] < told["requests"]
    assert done.returncode == 1
    assert "requests failed, and count as answers" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pattern", "write"), "it overwrites what is on the disk. Add --destroy-data"),
        (("--verify",), "verify: only what a load itself has written is compared"),
        (("--flush-every", "3"), "flush-every: flushes follow writes"),
        (("--read-share", "0.2"), "--read-share: randread has only one kind"),
        (("--block-size", "100"), "block size 100: it is no multiple of 512"),
        (("--block-size", "32M"), "are too few for 1 times 1 blocks"),
        (("--queues", "3"), "it has 2 queues, and the load is for 3"),
        (("--depth", "0"), "--depth: 0 is not in the range"),
    ],
)
def test_senseless_loads_are_refused(run: Run, memory: str, arguments: tuple[str, ...], said: str) -> None:
    done = run("vhostuser", "bench", memory, *SHORT, *arguments)
    assert_one_line(done, 2)
    assert said in done.stderr


def test_a_read_only_disk_is_not_written(run: Run, serving: Start, tmp_path: Path) -> None:
    place = str(tmp_path / "ro.sock")
    serving("serve", "null:size=1G", "--read-only", "--socket", place)
    done = run("vhostuser", "bench", place, "--pattern", "write", "--destroy-data", *SHORT)
    assert_one_line(done, 2)
    assert "its disk is read-only" in done.stderr


def test_a_silent_or_missing_back_end_is_one_line(run: Run, tmp_path: Path) -> None:
    done = run("vhostuser", "bench", str(tmp_path / "none.sock"), *SHORT)
    assert_one_line(done, 1)
    assert "there is no such socket" in done.stderr
