"""One queue of a disk, host side: what waits for room, what is in the ring, what is answered. Touches shared memory."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

from vhostuser.errors import VhostUserError
from vhostuser.frontend.dialogue import again
from vhostuser.virtio.blk_requests import BlkStatus

if TYPE_CHECKING:
    from vhostuser._native import RequestQueue
    from vhostuser.blk.limits import DiskLimits, Run
    from vhostuser.blk.requests import Job, Part
    from vhostuser.blk.shadow import Shadow
    from vhostuser.frontend.memory import Pool
    from vhostuser.frontend.queue import HostQueue


class Lane:
    """Puts jobs into one ring in their order, as far as there is room, and takes the answers out. Any thread.

    Data that is copied is copied when its turn in the ring comes, into room that this lane has for itself: lanes never
    wait for each other.
    """

    def __init__(self, queue: HostQueue[RequestQueue], room: Pool, limits: DiskLimits, *, timeout_s: float) -> None:
        """``room`` is for copies; ``timeout_s`` is how long the device may take for one request."""
        self.queue: Final = queue
        self.copied_bytes = 0
        self.answered = 0
        self._limits = limits
        self._room = room
        self._view = queue.memory.view
        self._base = queue.memory.guest_addr
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._flying: dict[int, tuple[Part, int | None, int, float]] = {}
        """By token, oldest first: the part, where its copy is, the guest address of its status, its deadline."""
        self._token = 0
        self._paused = False
        self._shadow: Shadow | None = None
        self._shadowed_from = 0  # the first token of which everything was seen
        self._over: VhostUserError | None = None

    @property
    def outstanding(self) -> int:
        """Requests in the ring."""
        return len(self._flying)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._flying and not self._waiting

    @property
    def deadline(self) -> float | None:
        """When the oldest request in the ring must be answered, on the monotonic clock; None without one."""
        with self._lock:
            return next(iter(self._flying.values()))[3] if self._flying else None

    def submit(self, jobs: Iterable[Job]) -> None:
        """Take ``jobs``, and put into the ring what fits. Raises what broke the connection, and takes none then."""
        with self._lock:
            if self._over is not None:
                raise again(self._over)
            self._waiting.extend(jobs)
            self._pump()

    def collect(self, finished: list[Job]) -> None:
        """Take all answers, fill the ring again, and add the jobs that are finished to the list: `Job.settle` them.

        Asks to be called for the next answer. Raises `RemoteRingError` when the device broke the ring.
        """
        with self._lock:
            if self._over is not None:
                return
            driver = self.queue.driver
            while True:
                for token, status, _ in driver.reap():
                    self._answer(token, status, finished)
                self._pump()
                if not driver.enable_calls():
                    return

    def restart(self) -> None:
        """The ring goes on behind another back-end: it has the whole time for each request, and `collect` is due."""
        with self._lock:
            self._paused = False
            deadline = time.monotonic() + self._timeout_s
            for token, (part, copy, status, _) in self._flying.items():
                self._flying[token] = (part, copy, status, deadline)
        os.eventfd_write(self.queue.call.fileno(), 1)

    def pause(self) -> None:
        """Put nothing more into the ring until `restart`: jobs that are submitted wait."""
        with self._lock:
            self._paused = True

    def held(self) -> AbstractContextManager[object]:
        """While it is entered nothing here is put into the ring or taken out."""
        return self._lock

    def follow(self, shadow: Shadow | None) -> None:
        """Tell ``shadow`` from now on what the driver writes, and what the device has to have written."""
        with self._lock:
            self._shadow = shadow
            self._shadowed_from = self._token + 1
            if shadow is not None:
                used, room = self.queue.areas[2], self._room
                shadow.keep(used, 6 + 8 * self.queue.size)
                shadow.keep(room.start, room.size)
                for _, _, status, _ in self._flying.values():
                    shadow.keep_status(status)

    def fail(self, error: VhostUserError) -> list[Job]:
        """Give up: nothing more is put into the ring. Returns every job that is not finished."""
        with self._lock:
            self._over = self._over or error
            jobs = dict.fromkeys([*(part.job for part, _, _, _ in self._flying.values()), *self._waiting])
            self._flying.clear()
            self._waiting.clear()
            return list(jobs)

    def _answer(self, token: int, status: int, finished: list[Job]) -> None:
        part, copy, status_addr, _ = self._flying[token]
        if self._shadow is not None and token >= self._shadowed_from:
            self._shadow.expect([(status_addr, 1)])
            if part.writable and status == BlkStatus.OK:
                self._shadow.expect(part.pieces if copy is None else [(self._base + copy, part.length)])
        if copy is None:
            last = part.job.answered(part, status, None)
        else:
            last = part.job.answered(part, status, self._view[copy : copy + part.length])
            self._room.give(copy, part.length)
        self.answered += 1
        del self._flying[token]  # not before: whatever goes wrong until here, `fail` still finds it
        if last:
            finished.append(part.job)

    def _pump(self) -> None:
        """Put parts into the ring while there is room for them and their copies."""
        driver = self.queue.driver
        any_new = False
        while self._waiting and not self._paused:
            job = self._waiting[0]
            part = job.next_part
            if part is None:
                self._waiting.popleft()
                continue
            if not self._put(driver, part):
                break
            any_new = True
            job.advance()
        if any_new and driver.publish():
            self.queue.notify()

    def _put(self, driver: RequestQueue, part: Part) -> bool:
        pieces, copy = part.pieces, None
        if pieces is None:
            if not driver.has_room(1):
                return False
            copy = self._room.take(part.length)
            if copy is None:
                return False
            pieces = self._pieces(copy, part.length)
        if not driver.has_room(len(pieces)):
            if copy is not None:
                self._room.give(copy, part.length)
            return False
        if copy is not None:
            self.copied_bytes += part.length
            if not part.writable:
                part.job.load(part, self._view[copy : copy + part.length])
        self._token += 1
        status = driver.submit(part.kind, part.sector, pieces, part.writable, self._token)
        self._flying[self._token] = (part, copy, status, time.monotonic() + self._timeout_s)
        if self._shadow is not None:
            self._shadow.keep_status(status)
            if copy is not None and not part.writable:
                self._shadow.wrote(copy, part.length)
        return True

    def _pieces(self, copy: int, length: int) -> list[Run]:
        if length <= self._limits.segment_bytes:
            return [(self._base + copy, length)]
        (pieces,) = self._limits.cut([(self._base + copy, length)])
        return pieces
