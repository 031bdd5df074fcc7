"""One connection to a disk: the device, its shared memory and its queues. Touches what `frontend` gives it.

Both clients stand on it: one lets a thread of its own call `step`, the other an event loop.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vhostuser._native import RequestQueue
from vhostuser.blk.lane import Lane
from vhostuser.blk.limits import MAX_REQUEST_BYTES, MAX_SECTORS, DiskLimits
from vhostuser.blk.requests import Job, Promise, Request
from vhostuser.errors import BackendRefused, BackendUnfit, PeerGone, RemoteRingError, SetupError, VhostUserError
from vhostuser.frontend.client import USABLE, HostDevice
from vhostuser.frontend.dialogue import again
from vhostuser.frontend.memory import PAGE, Buffer, Pool, SharedMemory
from vhostuser.frontend.queue import check_size, eventfd, request_queue
from vhostuser.frontend.reach import Endpoint
from vhostuser.protocol import ProtocolFeature
from vhostuser.virtio.blk import WRITEBACK_OFFSET, BlkFeature, VirtioBlkConfig
from vhostuser.virtio.features import RingFeature

USABLE_FEATURES: Final = int(
    BlkFeature.SIZE_MAX
    | BlkFeature.SEG_MAX
    | BlkFeature.GEOMETRY
    | BlkFeature.RO
    | BlkFeature.BLK_SIZE
    | BlkFeature.FLUSH
    | BlkFeature.TOPOLOGY
    | BlkFeature.CONFIG_WCE
    | BlkFeature.MQ
    | BlkFeature.DISCARD
    | BlkFeature.WRITE_ZEROES
) | int(RingFeature.INDIRECT_DESC | RingFeature.EVENT_IDX | RingFeature.VERSION_1)
"""The features that a client makes use of; it does without each of them."""

CONFIG_SIZES: Final = (60, 36, 8)
"""What is asked of the configuration space, in turn: up to the last field of the features above, as Cloud Hypervisor,
Firecracker and libblkio do; the least that QEMU asks for; the capacity alone."""


MAX_TIMEOUT_S: Final = 1_000_000.0
"""What still fits into the milliseconds of poll(2)."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How to connect to a disk. `vhostuser.connect` explains them."""

    queues: int = 1
    queue_size: int = 128
    memory: int = 64 << 20
    copy_memory: int | None = None
    timeout_s: float = 10.0
    request_timeout_s: float = 30.0
    listen: bool = False
    huge_pages: bool = False
    features: int = USABLE_FEATURES
    protocol_features: ProtocolFeature = USABLE

    def check(self) -> None:
        """Raise `SetupError` for numbers that make no sense."""
        check_size(self.queue_size)
        if self.queue_size < 4:
            raise SetupError(f"a queue of a disk has at least 4 descriptors, not {self.queue_size}")
        if not 1 <= self.queues <= 256:
            raise SetupError(f"a disk has 1 to 256 queues, not {self.queues}")
        for limit in (self.timeout_s, self.request_timeout_s):
            if not 0 < limit <= MAX_TIMEOUT_S:
                raise SetupError(f"a time limit is more than 0 and at most {MAX_TIMEOUT_S:.0f} s, not {limit}")

    @property
    def copies(self) -> int:
        """Bytes for copies, of each queue."""
        if self.copy_memory is None:
            return max(4 * MAX_REQUEST_BYTES, self.queue_size * 16384)
        return max(self.copy_memory // PAGE * PAGE, MAX_REQUEST_BYTES)


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """The configuration of a disk was another one before, and is this now."""

    old: VirtioBlkConfig
    new: VirtioBlkConfig


ChangeListener = Callable[[ConfigChange], None]


class DiskLink:
    """A disk that is connected and started. Any thread, but `step` and `close`.

    Once anything breaks it is over for good: every request under way fails, and so does every later call.
    """

    def __init__(self, endpoint: Endpoint, options: Options, changed: ChangeListener) -> None:
        """Connect, negotiate, share memory and start the queues. ``changed`` hears of changes of the configuration.

        Blocks, within the time limits. Raises `BackendUnfit` when it cannot be driven, `OperatorError` when nobody is
        there, and whatever a broken back-end deserves.
        """
        options.check()
        self.options: Final = options
        self.device: Final = HostDevice(
            endpoint,
            listen=options.listen,
            features=options.features,
            protocol_features=options.protocol_features,
            require=ProtocolFeature.CONFIG,
            timeout_s=options.timeout_s,
            drain_timeout_s=options.request_timeout_s,
        )
        self.lanes: Sequence[Lane] = ()
        self._changed = changed
        self._memory: SharedMemory | None = None
        self._copied_before = 0
        self._error: VhostUserError | None = None
        self._poll: Final = select.epoll()
        self._wake: Final = eventfd()
        self._wake_lock = threading.Lock()
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        device, options = self.device, self.options
        device.realize()
        if options.queues > device.max_queues:
            raise BackendUnfit(
                device.name,
                f"it has {device.max_queues} queues and {options.queues} were asked for",
                "Ask for fewer, or start the back-end with more",
            )
        self.config = VirtioBlkConfig.unpack(self._first_config())
        self.limits = DiskLimits.of(
            device.name,
            device.features,
            self.config,
            queue_size=options.queue_size,
            max_bytes=MAX_REQUEST_BYTES,
        )
        segments = self.limits.max_segments
        room = RequestQueue.bytes_needed(options.queue_size, segments)
        self._memory = memory = SharedMemory(
            options.queues * (room + options.copies), options.memory, huge_pages=options.huge_pages
        )
        lanes: list[Lane] = []
        for index in range(options.queues):
            queue = request_queue(memory, index, options.queue_size, seg_max=segments, features=device.features)
            pool = Pool(memory.reserve(options.copies), options.copies)
            lanes.append(Lane(queue, pool, self.limits, timeout_s=options.request_timeout_s))
            self.lanes = tuple(lanes)
        device.start(memory, [lane.queue for lane in lanes])
        self._poll.register(device.fileno(), select.EPOLLRDHUP)
        self._poll.register(self._wake.fileno(), select.EPOLLIN)
        for lane in lanes:
            self._poll.register(lane.queue.call.fileno(), select.EPOLLIN)
            self._poll.register(lane.queue.err.fileno(), select.EPOLLIN)

    def _first_config(self) -> bytes:
        refused: BackendRefused | None = None
        for size in CONFIG_SIZES:
            try:
                return self.device.watch_config(size, self._hear)
            except BackendRefused as error:
                refused = error
        raise BackendUnfit(
            self.device.name,
            f"it does not tell its configuration: {refused}",
            "Report it to the makers of the back-end",
        )

    @property
    def memory(self) -> SharedMemory:
        """The arena. Raises what ended the connection once it is closed."""
        if self._memory is None:
            raise again(self._error or PeerGone("the connection is closed"))
        return self._memory

    @property
    def features(self) -> int:
        """The virtio feature bits in use."""
        return self.device.features

    @property
    def error(self) -> VhostUserError | None:
        """Why it is over; None while it is good."""
        return self._error

    def fileno(self) -> int:
        """A descriptor that is readable while `step` has something to do."""
        return self._poll.fileno()

    def jobs(self, requests: Sequence[Request], promises: Sequence[Promise]) -> list[Job]:
        """Prepare ``requests``. Raises `RequestRefused` for the first that cannot be; nothing is held then."""
        made: list[Job] = []
        try:
            for request, promise in zip(requests, promises, strict=True):
                made.append(Job(request, self.limits, self.memory, promise))
        except BaseException:
            for job in made:
                job.release()
            raise
        return made

    def submit(self, jobs: Sequence[Job], lane: Lane) -> None:
        """Send ``jobs`` in one go through ``lane``; those with nothing to send are settled at once."""
        empty = [job for job in jobs if job.empty]
        try:
            lane.submit([job for job in jobs if not job.empty] if empty else jobs)
        except BaseException:
            for job in jobs:
                job.release()
            raise
        for job in empty:
            job.settle()

    def step(self, timeout_s: float = 0.0) -> bool:
        """Wait at most ``timeout_s``, take what has come, settle the jobs that are finished. False once it is over.

        One thread at a time.
        """
        events = {fd for fd, _ in self._poll.poll(timeout_s)}
        finished: list[Job] = []
        try:
            self._take(events, finished)
        except VhostUserError as error:
            self.fail(error)
        except Exception:  # nobody may wait for ever because of an error of ours
            log.exception("%s: an error of our own ends the connection", self.device.name)
            self.fail(PeerGone("the connection was given up because of an error of our own, which was logged"))
        for job in finished:
            job.settle()
        return self._error is None

    def _take(self, events: set[int], finished: list[Job]) -> None:
        if self._wake.fileno() in events:
            os.eventfd_read(self._wake.fileno())
        hung_up = self.device.fileno() in events
        for lane in self.lanes:
            if lane.queue.call.fileno() in events or hung_up:
                lane.queue.called()
                lane.collect(finished)
        if hung_up:
            raise again(self.device.dialogue.error or PeerGone("the back-end closed the connection"))
        now = time.monotonic()
        for lane in self.lanes:
            if lane.queue.err.fileno() in events and lane.queue.failed():
                raise RemoteRingError(f"the back-end reports that ring {lane.queue.index} is broken")
            if (deadline := lane.deadline) is not None and deadline <= now:
                lane.collect(finished)  # the answer may have come without a call
                if (deadline := lane.deadline) is not None and deadline <= now:
                    raise PeerGone(
                        f"the back-end left a request unanswered for {self.options.request_timeout_s:g} s, "
                        f"and {lane.outstanding - 1} after it"
                    )

    def patience(self) -> float:
        """How long `step` may wait before it has to look at the time, in seconds."""
        now = time.monotonic()
        deadlines = [deadline for lane in self.lanes if (deadline := lane.deadline) is not None]
        return max(0.0, min([self.options.request_timeout_s, *(deadline - now for deadline in deadlines)]))

    def wake(self) -> None:
        """Make a `step` that waits return. Any thread, also once it is closed."""
        with self._wake_lock:
            if not self._wake.closed:
                os.eventfd_write(self._wake.fileno(), 1)

    def fail(self, error: VhostUserError) -> None:
        """End it on account of ``error``: all jobs under way fail, each with an error of its own."""
        self._error = self._error or error
        self.device.dialogue.fail(error)
        for lane in self.lanes:
            for job in lane.fail(error):
                job.settle(again(error))

    @property
    def idle(self) -> bool:
        """Whether no job is under way."""
        return all(lane.idle for lane in self.lanes)

    @property
    def copied_bytes(self) -> int:
        """How much was copied between the caller's buffers and the arena."""
        return self._copied_before + sum(lane.copied_bytes for lane in self.lanes)

    def allocate(self, length: int) -> Buffer:
        """A buffer that the back-end uses in place. Raises `SetupError` when there is no room."""
        return self.memory.allocate(length)

    def set_write_cache(self, enabled: bool) -> None:
        """Write ``writeback`` of the configuration, and read what became of it. Raises `ConfigRefused`."""
        self.device.write_config(WRITEBACK_OFFSET, bytes([enabled]))
        # From the start: libvhost-user does not look at the offset, and answers with the first bytes of all.
        writeback = self.device.read_config(0, WRITEBACK_OFFSET + 1)[WRITEBACK_OFFSET]
        self.config = replace(self.config, writeback=writeback)

    def refresh(self) -> None:
        """Read the configuration again."""
        self.device.refresh_config()

    def _hear(self, _old: bytes, new: bytes) -> None:
        config = VirtioBlkConfig.unpack(new)
        if config.capacity > MAX_SECTORS:
            self.device.dialogue.fail(PeerGone(f"the back-end says now that it has {config.capacity} sectors"))
            return
        before, self.config = self.config, config
        self.limits = replace(self.limits, num_sectors=config.capacity)
        if config != before:
            self._changed(ConfigChange(before, config))

    def stop(self) -> None:
        """Stop the queues in order, once nothing is under way. Raises what goes wrong with that."""
        self.device.stop()
        self.device.reset()

    def close(self) -> None:
        """Hang up, fail what is under way, and give everything back. No `step` may run any more. Idempotent.

        Buffers that are still held keep their memory.
        """
        self.fail(PeerGone("the connection is closed"))
        self.device.close()
        for lane in self.lanes:
            lane.queue.close()
        self._copied_before, self.lanes, self._memory = self.copied_bytes, (), None
        self._poll.close()
        with self._wake_lock:
            self._wake.close()
