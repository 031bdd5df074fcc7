"""Loads from a front-end in this process, with what the public one does not do: tracked and logged requests.

The back-end is `vhostuser serve`, a process of its own, with one queue of 128 entries; the load runs natively on one
thread and polls for its answers. Not a guest: no interrupts, no file system, no hypervisor. Touches: processes.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.backend.frontend import USER_BASE, Frontend

from vhostuser._native import Arena, DirtyLog, InflightRegion, LoadResult, RequestQueue, StopFlag, run_load
from vhostuser.protocol import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    FrontendRequest,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    VringAddr,
    VringFd,
    VringFlag,
    VringState,
)

Req = FrontendRequest
GIB = 1 << 30
SPAN = 64 << 20
"""The part of the disk that is used. It is written once before, so that nobody measures how memory is first touched."""

QUEUE_SIZE = 128
DATA_AT = 4 << 20
ARENA = 64 << 20


@dataclass(frozen=True)
class Load:
    """Which requests, and how many at a time."""

    name: str
    block_size: int
    depth: int
    read_share: float
    sequential: bool = False


WARM_UP = Load("", 131072, 16, 0.0, sequential=True)


@contextmanager
def served(disk: str, directory: Path, *options: str, python: str = sys.executable) -> Iterator[str]:
    """`vhostuser serve` on a socket, ended afterwards; ``python``: the interpreter of the build that serves."""
    place = str(directory / f"bench{''.join(options)}.sock")
    words = [python, "-m", "vhostuser.cli.main", "serve", disk, "--socket", place, "--queues", "1", *options]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "serving" in line:
                break
        else:
            raise SystemExit(f"benchmarks: {disk} is not served")
        yield place
    finally:
        process.terminate()
        process.communicate()


def track(peer: Frontend) -> InflightRegion:
    """Has what queue 0 has in flight tracked in a region that the back-end makes."""
    answer = peer.ask(Req.GET_INFLIGHT_FD, Inflight(0, 0, 1, QUEUE_SIZE))
    assert isinstance(answer, Inflight)
    (fd,) = peer.fds
    with fd:
        peer.do(Req.SET_INFLIGHT_FD, answer, [fd.fileno()])
        return InflightRegion(
            fd.fileno(), offset=answer.mmap_offset, size=answer.mmap_size, num_queues=1, queue_size=QUEUE_SIZE
        )


@contextmanager
def started(
    place: str, *, tracked: bool = False, log: DirtyLog | None = None, end_log: bool = False
) -> Iterator[tuple[Callable[[Load, float], LoadResult], int]]:
    """Queue 0, once what loads reach was written: a function that runs one, and the back-end's process.

    ``log``: what the back-end writes from then on is logged there; with ``end_log`` that ends before the first load.
    """
    arena = Arena(ARENA)
    with Frontend.connect(place) as peer:
        features = peer.negotiate()
        if tracked:
            track(peer)
        peer.do(Req.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, ARENA, USER_BASE, 0),)), [arena.fd])
        queue = RequestQueue(arena, base=0, offset=4096, size=QUEUE_SIZE, seg_max=1, features=features)
        desc, avail, used = (USER_BASE + area for area in queue.areas)
        kick, call = os.eventfd(0), os.eventfd(0)
        peer.do(Req.SET_VRING_NUM, VringState(0, QUEUE_SIZE))
        peer.do(Req.SET_VRING_ADDR, VringAddr(0, 0, desc, used, avail, 0))
        peer.do(Req.SET_VRING_CALL, VringFd.of(0), [call])
        peer.do(Req.SET_VRING_KICK, VringFd.of(0), [kick])
        peer.do(Req.SET_VRING_ENABLE, VringState(0, 1))
        (pid,) = struct.unpack_from("i", peer.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            run(queue, WARM_UP, kick, call, seconds=60.0, requests=SPAN // WARM_UP.block_size)
            if log is not None:
                addr = VringAddr(0, VringFlag.LOG, desc, used, avail, queue.areas[2])
                peer.ask(Req.SET_LOG_BASE, Log(log.size, 0), [log.fd])
                peer.do(Req.SET_FEATURES, U64(features | F_PROTOCOL_FEATURES | F_LOG_ALL))
                peer.do(Req.SET_VRING_ADDR, addr)
            if log is not None and end_log:
                peer.do(Req.SET_FEATURES, U64(features | F_PROTOCOL_FEATURES))
                peer.do(Req.SET_VRING_ADDR, VringAddr(0, 0, desc, used, avail, 0))
                log.take()
            yield lambda load, seconds: run(queue, load, kick, call, seconds=seconds), pid
        finally:
            os.close(kick)
            os.close(call)


def run(
    queue: RequestQueue, load: Load, kick: int, call: int, *, seconds: float, requests: int = 1 << 62
) -> LoadResult:
    """One load, ended by time or number of requests, whichever comes first."""
    return run_load(
        queue,
        data=DATA_AT,
        address=DATA_AT,
        kick=kick,
        call=call,
        stop=StopFlag(),
        block_size=load.block_size,
        depth=load.depth,
        first_block=0,
        num_blocks=SPAN // load.block_size,
        read_share=load.read_share,
        sequential=load.sequential,
        duration_s=seconds,
        max_requests=requests,
        seed=1,
    )
