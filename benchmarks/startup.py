"""How long a server takes to begin, and how much memory it has: ``python -m benchmarks.startup``.

Medians of several starts on an image of 1 GiB, from just before fork and exec: until a connection is accepted by the
kernel, until the server has answered GET_FEATURES on it, and the processor time of the whole process to its end. Then
what is resident of one that has served every page of a guest with 512 MiB, and is not that guest's memory.
Touches: processes, a temporary directory, the package's bytecode.
"""

from __future__ import annotations

import argparse
import compileall
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.backend.frontend import INDIRECT_EVENT_V1, Frontend, GuestRam, GuestRing

import vhostuser
from vhostuser.protocol import FrontendRequest

MIB: Final = 1 << 20
IMAGE: Final = 1 << 30
GUEST: Final = 512 * MIB
RETRY_S: Final = 0.0002
"""How soon it is tried again to connect: the times are so much too long at most."""

PROGRAM: Final = Path(sys.executable).with_name("vhostuser")
_MAPPING: Final = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S{4} [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ (\d+)")


def compile_package() -> None:
    """Leave bytecode beside the package's sources, as installing it with pip does; `make build` leaves it to the first
    start, which may not be allowed to. Without it a start compiles all that it imports."""
    compileall.compile_dir(Path(vhostuser.__file__).parent, quiet=1)


def start(directory: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """`vhostuser serve`, as the installed program starts it; with `disk.img` and `disk.sock` in ``directory``."""
    words = ["serve", str(directory / "disk.img"), "--socket", str(directory / "disk.sock"), *options]
    return subprocess.Popen([str(PROGRAM), *words], stderr=subprocess.DEVNULL)


def connected(directory: Path) -> Frontend:
    """A connection, as soon as somebody listens."""
    while True:
        try:
            return Frontend.connect(str(directory / "disk.sock"))
        except OSError:
            time.sleep(RETRY_S)


def begin(directory: Path, options: list[str]) -> tuple[float, float, float]:
    """Seconds until it listens and until it has answered, and its processor time."""
    begun = time.monotonic()
    process = start(directory, options)
    peer = connected(directory)
    listening = time.monotonic()
    peer.number(FrontendRequest.GET_FEATURES)
    answered = time.monotonic()
    peer.close()
    process.terminate()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return listening - begun, answered - begun, used.ru_utime + used.ru_stime


def resident(directory: Path, options: list[str]) -> dict[str, int]:
    """Bytes of memory of a server that has filled a guest's from its disk: in all, without those of the guest, and of
    these the ones that no other process has."""
    process = start(directory, options)
    ram = GuestRam(GUEST)
    peer = connected(directory)
    ring = GuestRing(ram, 0, 16, INDIRECT_EVENT_V1)
    peer.negotiate()
    ram.share(peer)
    ring.start(peer)
    for at in range(2 * MIB, GUEST, MIB):
        request = (at // 512 << 64).to_bytes(16, "little")  # type 0: read
        memoryview(ram.arena)[ram.scratch : ram.scratch + 17] = request + b"\xff"
        ring.submit([(ram.scratch, 16)], [(at, MIB), (ram.scratch + 16, 1)])
        ring.wait()
        assert memoryview(ram.arena)[ram.scratch + 16] == 0, "a request failed"
    guest = os.fstat(ram.arena.fd).st_ino
    sizes = {"in all": 0, "without the guest's": 0, "of these its own alone": 0}
    for inode, key, size in mapped(process.pid):
        if key == "Rss":
            sizes["in all"] += size
        if inode == guest:
            continue
        if key == "Rss":
            sizes["without the guest's"] += size
        elif key in ("Private_Clean", "Private_Dirty"):
            sizes["of these its own alone"] += size
    peer.close()
    ring.close()
    process.terminate()
    process.wait()
    return sizes


def mapped(pid: int) -> Iterator[tuple[int, str, int]]:
    """The inode, the name of a number and the number in bytes, for all mappings of a process."""
    inode = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := _MAPPING.match(line):
            inode = int(head[1])
        elif line.endswith(" kB"):
            key, _, size = line.partition(":")
            yield inode, key, int(size.split()[0]) * 1024


def main() -> None:
    """Prints one line per number."""
    parser = argparse.ArgumentParser(prog="benchmarks.startup", description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("options", nargs="*", help="for vhostuser serve, after --")
    wanted = parser.parse_args()
    compile_package()
    with tempfile.TemporaryDirectory(prefix="vhu-") as name:
        directory = Path(name)
        with (directory / "disk.img").open("wb") as file:
            file.truncate(IMAGE)
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors, {wanted.runs} runs")
        runs = [begin(directory, wanted.options) for _ in range(wanted.runs)]
        texts = ("exec to listening", "exec to GET_FEATURES answered", "processor time of a process")
        for text, times in zip(texts, zip(*runs, strict=True), strict=True):
            middle, least, most = (1000 * one for one in (statistics.median(times), min(times), max(times)))
            print(f"{text:52} median {middle:6.0f} ms, {least:.0f} to {most:.0f}")
        for text, size in resident(directory, wanted.options).items():
            print(f"{'resident, ' + text:52} {size / MIB:6.1f} MiB")


if __name__ == "__main__":
    main()
