"""The connection to a disk: the device, its shared memory and its queues. Touches what `frontend` gives it.

Both clients stand on it: one lets a thread of its own call `step`, the other an event loop.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from vhostuser._native import RequestQueue
from vhostuser.blk.fitness import check_as_before, check_queues, check_same_features, first_config, limits_of
from vhostuser.blk.lane import Lane
from vhostuser.blk.options import ChangeListener, Options
from vhostuser.blk.requests import Job, Promise, Request
from vhostuser.blk.settings import LinkSettings
from vhostuser.errors import PeerGone, RemoteRingError, SetupError, VhostUserError
from vhostuser.frontend.client import HostDevice
from vhostuser.frontend.dialogue import again
from vhostuser.frontend.memory import Buffer, Pool, SharedMemory
from vhostuser.frontend.queue import eventfd, request_queue
from vhostuser.frontend.reach import Endpoint, name_of_endpoint
from vhostuser.protocol import ProtocolFeature
from vhostuser.virtio.blk import VirtioBlkConfig

log = logging.getLogger(__name__)

Deliver = Callable[[Callable[[], None]], None]
"""Runs what settles jobs where that may be done."""


class DiskLink(LinkSettings):
    """A disk that is connected and started. Any thread, but `step`, `open`, `resume` and `close`.

    When the connection is lost and the back-end keeps books of what is in flight, it is `away`: rings, buffers and jobs
    stay as they are, more can be submitted, and `resume` goes on with another back-end. Whatever else breaks, it is
    over for good: every request under way fails, and so does every later call.
    """

    def __init__(
        self, endpoint: Endpoint, options: Options, changed: ChangeListener, *, deliver: Deliver | None = None
    ) -> None:
        """``changed`` hears of changes of the configuration. `open` makes the connection."""
        options.check()
        super().__init__(changed)
        self.options: Final = options
        self.name = name_of_endpoint(endpoint)
        self.lanes: Sequence[Lane] = ()
        self.features = 0
        """The virtio feature bits in use."""
        self._endpoint = endpoint
        self._deliver: Final[Deliver] = deliver or (lambda task: task())
        self._memory: SharedMemory | None = None
        self._copied_before = 0
        self._departed: list[HostDevice] = []  # their listeners may still run
        self._given_up = threading.Event()
        self._poll: Final = select.epoll()
        self._wake: Final = eventfd()
        self._wake_lock = threading.Lock()

    def open(self) -> None:
        """Connect, negotiate, share memory and start the queues.

        Blocks, within the time limits. Raises `BackendUnfit` when it cannot be driven, `OperatorError` when nobody is
        there, and whatever a broken back-end deserves; it is closed then.
        """
        try:
            self._begin(self._connect(self.options.features))
        except BaseException:
            self.close()
            raise

    def _connect(self, features: int) -> HostDevice:
        self.device = device = self._dial(self._endpoint, features)
        if self._given_up.is_set():
            raise PeerGone(f"{self.name} was given up")
        device.realize()
        check_queues(device, self.options)
        return device

    def _dial(self, endpoint: Endpoint, features: int) -> HostDevice:
        options = self.options
        return HostDevice(
            endpoint,
            listen=options.listen,
            features=features,
            protocol_features=options.protocol_features,
            require=ProtocolFeature.CONFIG,
            timeout_s=options.timeout_s,
            drain_timeout_s=options.request_timeout_s,
            stop=self._given_up,
        )

    def reach(self, endpoint: Endpoint) -> HostDevice:
        """Connect to another back-end that the rings may go on at, and see whether it fits. It is the caller's.

        Blocks. Raises as `open`.
        """
        device = self._dial(endpoint, self.features)
        try:
            device.realize()
            check_queues(device, self.options)
            check_same_features(device, self.features)
        except BaseException:
            device.close()
            raise
        return device

    def adopt(self, device: HostDevice, endpoint: Endpoint) -> None:
        """The rings run at ``device`` from now on, and nobody runs them where they were: that is closed. It takes
        ``device``. For who calls `step`."""
        old = self._reached()
        self._poll.unregister(old.fileno())
        self.device, self._endpoint, self.name = device, endpoint, name_of_endpoint(endpoint)
        self._leave(old)
        self._poll.register(device.fileno(), select.EPOLLRDHUP)
        for lane in self.lanes:
            lane.restart()

    def _begin(self, device: HostDevice) -> None:
        options = self.options
        self.features = device.features
        told = first_config(device, self.hear)
        self._config_size = len(told)
        self.config = VirtioBlkConfig.unpack(told)
        self.limits = limits_of(device, self.config, options)
        segments = self.limits.max_segments
        room = RequestQueue.bytes_needed(options.queue_size, segments)
        self._memory = memory = SharedMemory(
            options.queues * (room + options.copies), options.memory, huge_pages=options.huge_pages
        )
        lanes: list[Lane] = []
        for index in range(options.queues):
            queue = request_queue(memory, index, options.queue_size, seg_max=segments, features=self.features)
            pool = Pool(memory.reserve(options.copies), options.copies)
            lanes.append(Lane(queue, pool, self.limits, timeout_s=options.request_timeout_s))
            self.lanes = tuple(lanes)
        device.start(memory, [lane.queue for lane in lanes])
        self._poll.register(device.fileno(), select.EPOLLRDHUP)
        self._poll.register(self._wake.fileno(), select.EPOLLIN)
        for lane in lanes:
            self._poll.register(lane.queue.call.fileno(), select.EPOLLIN)
            self._poll.register(lane.queue.err.fileno(), select.EPOLLIN)

    def resume(self) -> None:
        """Connect again after the connection was lost, and let the back-end go on with the rings as they are.

        Nothing is submitted again: the back-end answers what the other one has not. Time limits of requests begin
        anew. Blocks and raises as `open`, and can be tried again, unless it is `BackendUnfit`.
        """
        limits, region = self.limits, self._region
        if region is None:
            raise SetupError(f"{self.name} is not away")
        try:
            device = self._connect(self.features)
            device.check_resumable(region)
            device.watch_config(self._config_size, self.hear, known=b"")
            check_as_before(device, self.features, limits, limits_of(device, self.config, self.options))
            self._switch_back(device)
            device.start(self.memory, [lane.queue for lane in self.lanes], inflight=region)
            self._poll.register(device.fileno(), select.EPOLLRDHUP)
        except BaseException:
            if self.device is not None:
                self.device.take_inflight()  # what it has taken over is kept here
                self._leave(self.device)
            raise
        self._region = self._away = None
        for lane in self.lanes:
            lane.restart()

    def give_up(self) -> None:
        """Make `open` or `resume` end, which runs on another thread."""
        self._given_up.set()
        if (device := self.device) is not None:
            device.dialogue.fail(PeerGone(f"{self.name} was given up"))

    @property
    def memory(self) -> SharedMemory:
        """The arena. Raises what ended the connection once it is closed."""
        if self._memory is None:
            raise again(self._error or PeerGone("the connection is closed"))
        return self._memory

    @property
    def error(self) -> VhostUserError | None:
        """Why it is over; None while it is good."""
        return self._error

    @property
    def away(self) -> VhostUserError | None:
        """Why there is no connection now, though it is not over; None while there is one."""
        return self._away

    @property
    def connected(self) -> bool:
        """Whether the back-end is there."""
        return self._error is None and self._away is None

    @property
    def serving(self) -> bool:
        """Whether the caller runs on the thread of a back-end channel."""
        return any(device.serving for device in (self.device, *self._departed) if device is not None)

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
        """Wait at most ``timeout_s``, take what has come, settle the jobs that are finished. False once it is lost.

        One thread at a time. Not while it is `away`.
        """
        events = {fd for fd, _ in self._poll.poll(timeout_s)}
        finished: list[Job] = []
        try:
            self._take(events, finished)
        except VhostUserError as error:
            self.fail(error)
        except Exception:  # nobody may wait for ever because of an error of ours
            log.exception("%s: an error of our own ends the connection", self.name)
            self.fail(PeerGone("the connection was given up because of an error of our own, which was logged"))
        for job in finished:
            job.settle()
        return self.connected

    def _take(self, events: set[int], finished: list[Job]) -> None:
        device = self.device
        hung_up = device is None or device.fileno() in events
        if self._wake.fileno() in events:
            os.eventfd_read(self._wake.fileno())
        for lane in self.lanes:
            if lane.queue.call.fileno() in events or hung_up:
                lane.queue.called()
                lane.collect(finished)
        now = time.monotonic()
        for lane in self.lanes:
            if lane.queue.err.fileno() in events and lane.queue.failed():
                raise RemoteRingError(f"the back-end reports that ring {lane.queue.index} is broken")
        if hung_up:
            self._lose()
            return
        for lane in self.lanes:
            if (deadline := lane.deadline) is not None and deadline <= now:
                lane.collect(finished)  # the answer may have come without a call
                if (deadline := lane.deadline) is not None and deadline <= now:
                    raise PeerGone(
                        f"the back-end left a request unanswered for {self.options.request_timeout_s:g} s, "
                        f"and {lane.outstanding - 1} after it"
                    )

    def _lose(self) -> None:
        """The connection is gone: keep everything else for another, if the back-end has kept its books."""
        device = self.device
        error = device.dialogue.error if device is not None else None
        reason = again(error or PeerGone("the back-end closed the connection"))
        region = device.take_inflight() if device is not None else None
        if device is None or region is None:
            raise reason
        self._region, self._away = region, reason
        self._poll.unregister(device.fileno())
        self._leave(device)

    def _leave(self, device: HostDevice) -> None:
        """Close a connection without waiting for a listener, which may itself wait for a later one."""
        device.close(wait=False)
        self._departed = [*(other for other in self._departed if not other.quiet and other is not device), device]

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
        region, self._region = self._region, None
        if region is not None:
            region.close()
        if self.device is not None:
            self.device.dialogue.fail(error)
        for lane in self.lanes:
            for job in lane.fail(error):
                self._deliver(partial(job.settle, again(error)))

    @property
    def idle(self) -> bool:
        """Whether no job is under way."""
        return all(lane.idle for lane in self.lanes)

    @property
    def answered(self) -> int:
        """How many requests were answered so far."""
        return sum(lane.answered for lane in self.lanes)

    @property
    def copied_bytes(self) -> int:
        """How much was copied between the caller's buffers and the arena."""
        return self._copied_before + sum(lane.copied_bytes for lane in self.lanes)

    def allocate(self, length: int) -> Buffer:
        """A buffer that the back-end uses in place. Raises `SetupError` when there is no room."""
        return self.memory.allocate(length)

    def stop(self) -> None:
        """Stop the queues in order, once nothing is under way. Raises what goes wrong with that."""
        device = self._reached()
        device.stop()
        device.reset()

    def close(self, *, wait: bool = True) -> None:
        """Hang up, fail what is under way, and give everything back. No `step` may run any more. Idempotent.

        Waits for listeners that hear of the configuration now, unless told not to. Buffers that are still held keep
        their memory.
        """
        self.fail(PeerGone("the connection is closed"))
        for device in (self.device, *self._departed):
            if device is not None:
                device.close(wait=wait)
        for lane in self.lanes:
            lane.queue.close()
        self._copied_before, self.lanes, self._memory = self.copied_bytes, (), None
        self._poll.close()
        with self._wake_lock:
            self._wake.close()
