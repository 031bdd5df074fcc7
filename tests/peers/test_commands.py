"""`vhostuser probe`, `copy` and `bench`, run as a user runs them, against every kind of back-end."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
from tests.guest.backends import program
from tests.guest.packages import PROJECT
from tests.peers.conftest import SIZE, Serve
from tests.peers.daemons import NAMES
from tests.peers.test_peers import identical

PEERS: Final = [pytest.param(name, marks=[] if name == "ours" else pytest.mark.interop) for name in NAMES]
LIMIT_S: Final = 120.0


def run(*words: str | Path) -> dict[str, Any]:
    """Run a command with ``--json`` and return what it reports; fails the test when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    command = [*program(), *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT_S)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", PEERS)
def test_probe_tells_what_a_back_end_is(name: str, serve: Serve, image: Path) -> None:
    told = run("probe", serve(name, image, queues=3).socket)
    assert told["num_queues"] == 3
    assert told["config"]["capacity"] == SIZE // 512
    assert {"VERSION_1", "FLUSH", "MQ"} <= set(told["features"]["names"])
    assert {"CONFIG", "REPLY_ACK", "MQ"} <= set(told["protocol_features"]["names"])
    able = {host["name"]: host["able"] for host in told["hosts"]}
    assert able["QEMU"]
    assert able["Cloud Hypervisor"]
    assert able["libblkio"]
    for host in told["hosts"]:
        assert host["able"] or host["reasons"]


@pytest.mark.parametrize("name", PEERS)
def test_copies_out_of_and_into_a_back_end_are_the_same_bytes(
    name: str, serve: Serve, image: Path, place: Path
) -> None:
    backend = serve(name, image)
    out, source = place / "out.img", place / "source.img"
    run("copy", backend.socket, out, "--verify")
    assert identical(out, image)
    source.write_bytes(bytes(1 << 20) + os.urandom(SIZE - (2 << 20)) + bytes(1 << 20))
    run("copy", source, backend.socket, "--verify")
    backend.stop()
    assert identical(source, image)


@pytest.mark.parametrize("name", PEERS)
def test_bench_measures_and_verifies_a_back_end(name: str, serve: Serve, image: Path) -> None:
    backend = serve(name, image, queues=2)
    words = ("--pattern", "randrw", "--verify", "--destroy-data", "--time", "0.3", "--queues", "2")
    told = run("bench", backend.socket, *words)
    assert told["requests"] > 0
    assert told["errors"] == told["mismatches"] == 0
    assert 0 < told["latency_us"]["reads"]["p50"] <= told["latency_us"]["reads"]["p99.99"]


@pytest.mark.interop
def test_a_disk_is_copied_from_one_maker_s_back_end_to_another_s(serve: Serve, image: Path, place: Path) -> None:
    target = place / "target.img"
    target.write_bytes(os.urandom(SIZE))
    source, sink = serve("qsd-11.1", image), serve("rust-vmm", target)
    run("copy", source.socket, sink.socket, "--verify")
    assert identical(image, target)
