"""A load on one back-end, and what came of it. Touches one connection, shared memory, a thread per queue, clocks.

The loop itself is native (`run_load`): it keeps every queue full and times every answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from vhostuser._native import LoadResult, RequestQueue, StopFlag, run_load
from vhostuser.bench.latency import Latencies
from vhostuser.blk.limits import DiskLimits
from vhostuser.blk.options import USABLE_FEATURES
from vhostuser.blk.probe import told_config
from vhostuser.errors import BackendUnfit, UsageError
from vhostuser.frontend.client import HostDevice
from vhostuser.frontend.memory import Buffer, SharedMemory
from vhostuser.frontend.queue import HostQueue, request_queue
from vhostuser.frontend.reach import Endpoint
from vhostuser.protocol import ProtocolFeature
from vhostuser.virtio.blk import VirtioBlkConfig
from vhostuser.virtio.features import RingFeature

MAX_BLOCK_SIZE: Final = 1 << 30
MAX_VERIFIED: Final = 1 << 22
"""So many blocks of a queue are used at most when what they hold is remembered."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """What kind of requests, and where."""

    read_share: float
    sequential: bool


PATTERNS: Final[Mapping[str, Pattern]] = {
    "read": Pattern(1.0, sequential=True),
    "write": Pattern(0.0, sequential=True),
    "randread": Pattern(1.0, sequential=False),
    "randwrite": Pattern(0.0, sequential=False),
    "randrw": Pattern(0.5, sequential=False),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What to do. Every queue has a part of the disk for itself."""

    pattern: Pattern
    block_size: int = 4096
    depth: int = 32
    """Requests under way, of each queue."""
    queues: int = 1
    span: int | None = None
    """Bytes of the disk that are used, from its start; None: all."""
    flush_every: int = 0
    verify: bool = False
    """Remember what is written, and compare what is read of it."""
    sleeping: bool = False
    """Wait for notifications instead of looking all the time."""
    answer_limit_s: float = 30.0

    @property
    def writes(self) -> bool:
        """Whether it overwrites the disk."""
        return self.pattern.read_share < 1

    def check(self) -> None:
        """Raise `UsageError` for what makes no sense, whatever the disk."""
        if self.block_size % 512 or not 512 <= self.block_size <= MAX_BLOCK_SIZE:
            raise UsageError(
                f"block size {self.block_size}", f"it is no multiple of 512 up to {MAX_BLOCK_SIZE}", "Choose another"
            )
        if self.verify and not 0 < self.pattern.read_share < 1:
            raise UsageError(
                "verify", "only what a load itself has written is compared when it reads", "Choose a pattern with both"
            )
        if self.flush_every and not self.writes:
            raise UsageError("flush-every", "flushes follow writes, and this pattern has none", "Choose another")


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a load."""

    reads: Latencies
    writes: Latencies
    flushes: Latencies
    errors: int
    """Answers with another status than OK."""
    mismatches: int
    """Reads that brought something else than what was written."""
    first_mismatch: int | None
    """The byte of the disk where the first such block begins."""
    elapsed_s: float
    client_cpu_s: float
    """Processor time of the threads of the load."""
    backend_cpu_s: float | None
    """Processor time of the back-end's process; None when it cannot be seen."""
    kicks: int
    sleeps: int
    block_size: int

    @property
    def requests(self) -> int:
        """Reads and writes."""
        return self.reads.count + self.writes.count

    @property
    def iops(self) -> float:
        """Reads and writes per second."""
        return self.requests / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Of both directions together."""
        return self.iops * self.block_size

    @property
    def client_cpu_us(self) -> float | None:
        """Processor time of the load per request, in microseconds."""
        return self.client_cpu_s * 1e6 / self.requests if self.requests else None

    @property
    def backend_cpu_us(self) -> float | None:
        """Processor time of the back-end per request, in microseconds."""
        return self.backend_cpu_s * 1e6 / self.requests if self.requests and self.backend_cpu_s is not None else None

    def all_latencies(self) -> Latencies:
        """Reads and writes together."""
        return Latencies.of([self.reads.buckets, self.writes.buckets])


class Target:
    """One disk, connected and started for one load. For one thread."""

    def __init__(self, endpoint: Endpoint, load: Load, *, timeout_s: float = 10.0) -> None:
        """Connect to ``endpoint``. Raises `UsageError` for a load that the disk cannot take, `BackendUnfit` for a disk
        that cannot be driven, and what connecting raises."""
        load.check()
        self.load: Final = load
        self.device: Final = HostDevice(
            endpoint, features=USABLE_FEATURES, require=ProtocolFeature.CONFIG, timeout_s=timeout_s
        )
        self._queues: list[HostQueue[RequestQueue]] = []
        self._buffers: list[Buffer] = []
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.device.name

    def _begin(self) -> None:
        device, load = self.device, self.load
        device.realize()
        if load.queues > device.max_queues:
            raise UsageError(
                self.name, f"it has {device.max_queues} queues, and the load is for {load.queues}", "Use fewer queues"
            )
        told = told_config(device, device.features_offered, [])
        if not told:
            raise BackendUnfit(
                self.name, "it does not tell its configuration", "Report it to the makers of the back-end"
            )
        # With indirect descriptors a request takes one of the ring, else one each for header, data and status.
        each = 1 if device.features & RingFeature.INDIRECT_DESC else 3
        size = 1 << max(load.depth * each - 1, 3).bit_length()
        limits = DiskLimits.of(
            self.name, device.features, VirtioBlkConfig.unpack(told), queue_size=size, max_bytes=MAX_BLOCK_SIZE
        )
        self._check_fit(limits)
        self._part = self._blocks(limits)
        room = load.depth * load.block_size
        memory = SharedMemory(load.queues * RequestQueue.bytes_needed(size, 1), load.queues * (room + 4096))
        for index in range(load.queues):
            self._queues.append(request_queue(memory, index, size, seg_max=1, features=device.features))
            self._buffers.append(memory.allocate(room))
        device.start(memory, self._queues)

    def _check_fit(self, limits: DiskLimits) -> None:
        load = self.load
        if load.writes and limits.read_only:
            raise UsageError(self.name, "its disk is read-only", "Choose a pattern that only reads")
        if load.flush_every and not limits.flushes:
            raise UsageError(self.name, "its disk has no flushes", "Leave out --flush-every")
        most = min(limits.segment_bytes, limits.max_bytes)
        if load.block_size % limits.block_size or load.block_size > most:
            raise UsageError(
                f"block size {load.block_size}",
                f"{self.name} takes multiples of {limits.block_size}, up to {most} in one piece",
                "Choose another",
            )

    def _blocks(self, limits: DiskLimits) -> int:
        """How many blocks each queue has for itself."""
        load = self.load
        span = min(limits.size, load.span or limits.size)
        part = span // load.block_size // load.queues
        needed = 2 * load.depth if load.verify else 1
        if part < needed:
            raise UsageError(
                self.name,
                f"{span} bytes are too few for {load.queues} times {needed} blocks of {load.block_size}",
                "Use a smaller block size, depth or number of queues",
            )
        return min(part, MAX_VERIFIED) if load.verify else part

    def run(self, seconds: float, *, seed: int = 0, pid: int | None = None) -> Measured:
        """Run the load for that long and return what came of it. Blocks; other Python threads run.

        ``pid`` is the back-end's process, if it is to be watched. Raises `PeerGone` when a request is left unanswered,
        `RemoteRingError` for a back-end that breaks a ring.
        """
        stop = StopFlag()
        before = process_cpu_s(pid)
        with ThreadPoolExecutor(len(self._queues), thread_name_prefix="load") as threads:
            futures = [
                threads.submit(self._run_queue, index, seconds, seed, stop) for index in range(len(self._queues))
            ]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
        after = process_cpu_s(pid)
        results = [future.result() for future in futures]
        backend_cpu_s = after - before if after is not None and before is not None else None
        return self._together(results, backend_cpu_s)

    def _run_queue(self, index: int, seconds: float, seed: int, stop: StopFlag) -> tuple[LoadResult, float]:
        load, queue, buffer = self.load, self._queues[index], self._buffers[index]
        started = time.thread_time()
        result = run_load(
            queue.driver,
            data=buffer.offset,
            address=buffer.guest_addr,
            kick=queue.kick.fileno(),
            call=queue.call.fileno(),
            stop=stop,
            block_size=load.block_size,
            depth=load.depth,
            first_block=index * self._part,
            num_blocks=self._part,
            read_share=load.pattern.read_share,
            sequential=load.pattern.sequential,
            flush_every=load.flush_every,
            verify=load.verify,
            sleeping=load.sleeping,
            duration_s=seconds,
            answer_limit_s=load.answer_limit_s,
            seed=seed * len(self._queues) + index + 1,
        )
        return result, time.thread_time() - started

    def _together(self, results: list[tuple[LoadResult, float]], backend_cpu_s: float | None) -> Measured:
        wrong = [result.first_mismatch for result, _ in results if result.first_mismatch is not None]
        return Measured(
            reads=Latencies.of(result.reads for result, _ in results),
            writes=Latencies.of(result.writes for result, _ in results),
            flushes=Latencies.of(result.flushes for result, _ in results),
            errors=sum(result.errors for result, _ in results),
            mismatches=sum(result.mismatches for result, _ in results),
            first_mismatch=min(wrong) * self.load.block_size if wrong else None,
            elapsed_s=max(result.elapsed_s for result, _ in results),
            client_cpu_s=sum(cpu_s for _, cpu_s in results),
            backend_cpu_s=backend_cpu_s,
            kicks=sum(result.kicks for result, _ in results),
            sleeps=sum(result.sleeps for result, _ in results),
            block_size=self.load.block_size,
        )

    def stop(self) -> None:
        """Stop the queues in order, as a hypervisor does. Raises what goes wrong with that."""
        self.device.reset()

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.device.close()
        for queue in self._queues:
            queue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self.close()


def process_cpu_s(pid: int | None) -> float | None:
    """Processor time that a process has used, in seconds, all threads; None when there is none, or it cannot be seen.

    Its clock is the one of clock_getcpuclockid(3), which Linux makes of the number.
    """
    if pid is None:
        return None
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return None
