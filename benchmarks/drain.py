"""What two workers save over one: ``python -m benchmarks.drain``.

Two rings are filled with 32,768 reads of 4 KiB each before the back-end may look at them, and the time is taken until
the last is answered. Nobody makes requests meanwhile: the client sleeps until both rings call it. The workers are
pinned, one of them to one processor, two to two. Touches: processes, their threads' affinity, a temporary directory.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.loads import served
from tests.backend.frontend import USER_BASE, Frontend

from vhostuser._native import Arena, RequestQueue
from vhostuser.bench import median, median_interval
from vhostuser.protocol import FrontendRequest, MemoryRegion, MemoryTable, VringAddr, VringFd, VringState

Req = FrontendRequest
SIZE = 32768
QUEUES = 2
BLOCK = 4096
BUFFERS = 64
"""Each ring's requests share so many buffers: what is measured is not how memory is first touched."""

SPAN = 64 << 20
T_IN = 0
LIMIT_S = 60.0
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


def pin(pid: int) -> None:
    """Gives each worker of a back-end a processor of its own."""
    processors = sorted(os.sched_getaffinity(0))
    workers = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith("vhost-queue-"):
            os.sched_setaffinity(int(task.name), {processors[workers % len(processors)]})
            workers += 1


def drain(place: str) -> float:
    """Seconds from the moment the rings are enabled until both are drained."""
    per_queue = RequestQueue.bytes_needed(SIZE, 1)
    length = QUEUES * (per_queue + BUFFERS * BLOCK)
    arena = Arena(length)
    with Frontend.connect(place) as peer:
        features = peer.negotiate()
        peer.do(Req.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, length, USER_BASE, 0),)), [arena.fd])
        (pid,) = struct.unpack_from("i", peer.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        used_indices: dict[int, int] = {}
        for index in range(QUEUES):
            queue = RequestQueue(
                arena, base=0, offset=index * per_queue, size=SIZE, seg_max=1, features=features
            )  # fmt: skip
            buffers = QUEUES * per_queue + index * BUFFERS * BLOCK
            for number in range(SIZE):
                at = buffers + number % BUFFERS * BLOCK
                sector = (number * 7919 + index) % (SPAN // BLOCK) * (BLOCK // 512)
                queue.submit(T_IN, sector, [(at, BLOCK)], True, number)
            queue.publish()
            if queue.enable_calls(SIZE):
                raise SystemExit("benchmarks: requests were answered before they could be")
            desc, avail, used = (USER_BASE + area for area in queue.areas)
            call, kick = os.eventfd(0), os.eventfd(1)
            peer.do(Req.SET_VRING_NUM, VringState(index, SIZE))
            peer.do(Req.SET_VRING_ADDR, VringAddr(index, 0, desc, used, avail, 0))
            peer.do(Req.SET_VRING_CALL, VringFd.of(index), [call])
            peer.do(Req.SET_VRING_KICK, VringFd.of(index), [kick])
            os.close(kick)
            used_indices[call] = queue.areas[2] + 2
        pin(pid)
        memory = memoryview(arena)
        waiting = set(used_indices)
        begun = time.perf_counter()
        for index in range(QUEUES):
            peer.send(Req.SET_VRING_ENABLE, VringState(index, 1))
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], LIMIT_S)
            if not ready:
                raise SystemExit("benchmarks: the back-end does not answer")
            ended = time.perf_counter()
            for call in ready:
                os.eventfd_read(call)
                # The first notification of a ring comes early: the device does not know what it said before.
                (used_index,) = struct.unpack_from("<H", memory, used_indices[call])
                if used_index == SIZE:
                    waiting.discard(call)
        memory.release()
        for call in used_indices:
            os.close(call)
        return ended - begun


def main() -> None:
    """Prints a line for each disk."""
    parser = argparse.ArgumentParser(prog="benchmarks.drain", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose vhostuser serves")
    parser.add_argument("disks", nargs="*", help="as for vhostuser serve; by default a file in memory and one on disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vhu-", dir=MEMORY) as first, tempfile.TemporaryDirectory() as second:
        for disk in options.disks or (filled(Path(first)), filled(Path(second))):
            compare(disk, options.python, options.rounds)


def filled(directory: Path) -> str:
    """An image with data in ``directory``, in the page cache."""
    image = directory / "disk.img"
    image.write_bytes(os.urandom(SPAN))
    return str(image)


def compare(disk: str, python: str, rounds: int) -> None:
    """Has one worker and two drain in turn, and prints what came of it."""
    ratios: list[float] = []
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="vhu-") as name:
        shape = ("--queues", str(QUEUES), "--control", "none", "--no-lock")
        with (
            served(disk, Path(name), *shape, "--threads", "1", python=python) as one,
            served(disk, Path(name), *shape, "--threads", "2", python=python) as two,
        ):
            drain(one)
            drain(two)
            for _ in range(rounds):
                for workers, place in ((1, one), (2, two)):
                    times[workers].append(drain(place))
                ratios.append(times[2][-1] / times[1][-1])
    ratio = median_interval(ratios)
    print(
        f"{disk}: one worker {median(times[1]) * 1e3:.1f} ms, two {median(times[2]) * 1e3:.1f} ms, ratio "
        f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}, {ratio.coverage:.0%})"
    )


if __name__ == "__main__":
    main()
