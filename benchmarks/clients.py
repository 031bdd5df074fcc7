"""The load, from outside: ``vhostuser bench`` of the same build as the server, and ``qemu-img bench`` as one that is
nobody's own. Both are pinned to one processor. Touches: processes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.cases import SPAN, Case
from benchmarks.results import Sample
from benchmarks.servers import Failed, Server
from tests.guest.packages import PackagesError
from tests.guest.prepare import OFFERS, Qemu

from vhostuser.bench.load import process_cpu_s

LIMIT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Client:
    """How loads are run."""

    program: Sequence[str]
    core: int
    environment: Mapping[str, str]

    def words(self, socket: str, case: Case, seconds: float) -> list[str]:
        """The command line of one load."""
        words = ["taskset", "-c", str(self.core), *self.program, "bench", socket, "--json"]
        words += ["--pattern", case.pattern, "--block-size", str(case.block_size), "--depth", str(case.depth)]
        words += ["--queues", str(case.queues), "--span", str(SPAN), "--time", str(seconds)]
        words += ["--flush-every", str(case.flush_every)] if case.flush_every else []
        return words + ["--sleeping"] * case.sleeping + ["--destroy-data"] * case.writes

    def run(self, server: Server, case: Case, seconds: float) -> Sample:
        """One load on one server. Raises `Failed` when a request failed."""
        said = run(self.words(str(server.socket), case, seconds), self.environment)
        told = json.loads(said)
        if told["errors"] or told["mismatches"] or not told["requests"]:
            raise Failed(f"{case.name} on {server.name}: {told['errors']} of {told['requests']} requests failed")
        return sample_of(told)

    def fill(self, server: Server, seconds: float = 1.0) -> None:
        """Write what loads reach, so that nobody measures how memory is first touched."""
        self.run(server, Case("memory", "write", 8, block_size=1 << 20), seconds)


def sample_of(told: Mapping[str, object]) -> Sample:
    """What ``vhostuser bench --json`` told of a load that only reads or only writes."""
    kinds = told["latency_us"]
    assert isinstance(kinds, dict)
    (times,) = (times for kind, times in kinds.items() if kind != "flushes")
    rate, cpu = told["iops"], told["backend_cpu_us"]
    assert isinstance(rate, float)
    assert isinstance(cpu, float | None)
    return Sample(rate, cpu, times["p50"], times["p99"], times["p99.9"])


def run(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command writes to its standard output. Raises `Failed` when it fails or takes too long."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env=dict(environment), timeout=LIMIT_S, cwd="/"
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"no end after {LIMIT_S:.0f} s: {shlex.join(words)}") from None
    if done.returncode:
        raise Failed(f"{shlex.join(words)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def qemu_with_libblkio() -> Qemu | None:
    """The QEMU whose tools reach a vhost-user back-end through libblkio; None when it is not here."""
    offer = OFFERS["sid"]
    try:
        return offer.fetch() if offer.ready() else None
    except PackagesError:
        return None


@dataclass(frozen=True, slots=True)
class QemuImg:
    """``qemu-img bench``: 4 KiB reads one after the other."""

    qemu: Qemu
    core: int

    def words(self, socket: str, depth: int, count: int) -> list[str]:
        """Its command line."""
        words = ["taskset", "-c", str(self.core), *self.qemu.command("qemu-img"), "bench", "--image-opts"]
        disk = f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on"
        return [*words, "-c", str(count), "-d", str(depth), "-s", "4096", disk]

    def run(self, server: Server, depth: int, count: int) -> Sample:
        """``count`` reads. Raises `Failed`."""
        before = process_cpu_s(server.pid)
        environment = {**os.environ, **self.qemu.environment()}
        said = run(self.words(str(server.socket), depth, count), environment)
        after = process_cpu_s(server.pid)
        found = re.search(r"Run completed in ([0-9.]+) seconds", said)
        if found is None or before is None or after is None:
            raise Failed(f"qemu-img bench on {server.name}: {said.strip()[-300:]}")
        return Sample(count / float(found[1]), (after - before) * 1e6 / count)
