"""Serves one device to one front-end after another. Touches the listening socket and the connections it accepts."""

from __future__ import annotations

import logging
import os
import resource
import select
import selectors
import threading
import time
from types import TracebackType
from typing import Final, Self

from vhostuser.backend.device import LOOK_S, Device
from vhostuser.backend.ring_messages import MAX_MEM_SLOTS
from vhostuser.backend.session import Session
from vhostuser.errors import DrainTimeout, SetupError, VhostUserError
from vhostuser.fds import Fd
from vhostuser.transport import Listener, Transport

FDS_PER_REGION: Final = 3
"""One received, one duplicated for the mapping, and those of the table that is being replaced."""
FDS_PER_RING: Final = 6
"""Kick, call and err, here and in the native queues."""
SPARE_FDS: Final = 128
ACCEPT_PAUSE_S: Final = 1.0
"""How long to wait when no connection can be accepted, as when there are too many open files."""
REST_PAUSE_S: Final = 0.001
"""How often to look whether storage is at rest."""

log = logging.getLogger(__name__)


class Server:
    """Listens, and runs one `Session` at a time on a thread of its own.

    While a front-end is connected a second one is refused at once. While the storage of one that has left still
    works, the next one waits for it, at most ``drain_timeout_s``. An error in a session never ends the server.
    """

    def __init__(
        self,
        device: Device,
        endpoint: Listener | Transport,
        *,
        drain_timeout_s: float = 30.0,
        stop_timeout_s: float | None = None,
        once: bool = False,
    ) -> None:
        """Takes ``endpoint``: a listener, or one connection that somebody else has accepted, which is served alone.

        ``stop_timeout_s``: how long storage may take to come to rest after `stop`; None for ``drain_timeout_s``.
        ``once``: end when the first front-end has left. The device stays the caller's. The limit of open descriptors is
        raised here, where a process may still change its limits (see `vhostuser.sandbox`).
        """
        self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._device = device
        self._listener = endpoint if isinstance(endpoint, Listener) else None
        self._only = endpoint if isinstance(endpoint, Transport) else None
        self._once = once or self._listener is None
        self._drain_timeout_s = drain_timeout_s
        self._stop_timeout_s = drain_timeout_s if stop_timeout_s is None else stop_timeout_s
        self._resting = False
        self._accepting = False
        self._stopping = threading.Event()
        self._session: Session | None = None
        self._session_thread: threading.Thread | None = None
        self._session_over = threading.Event()
        self._waiting: Transport | None = None
        self._waiting_until = 0.0
        self._looking = True  # for an heir of the storage; while there is a session it is for that to look
        self._served = False
        self._thread: threading.Thread | None = None
        raise_fd_limit(device.num_queues)

    def __del__(self) -> None:
        self._wake.close()  # not sooner: `stop` may come at any time, also from a signal handler

    @property
    def connected(self) -> bool:
        """Whether a front-end is connected. Any thread."""
        session = self._session
        return session is not None and session.open

    @property
    def in_flight(self) -> int:
        """Requests taken and not answered. Any thread."""
        return sum(queue.get("in_flight", 0) for queue in self._device.queues.stats())

    @property
    def recoverable(self) -> bool:
        """Whether requests that are never answered stay in an in-flight region of the front-end. Any thread."""
        session = self._session
        return session is not None and session.recoverable

    def run(self) -> None:
        """Serve until `stop` is called, or the only front-end has left; then return once its storage is at rest.

        Runs on the caller's thread. Raises `VhostUserError` or `OSError` when listening itself fails.
        """
        with selectors.DefaultSelector() as selector:
            try:
                selector.register(self._wake, selectors.EVENT_READ)
                if self._only is not None:
                    self._begin(self._only)
                self._look_after()
                while not self._stopping.is_set() and not (self._once and self._served and self._session is None):
                    self._watch_listener(selector)
                    for key, _ in selector.select(self._patience()):
                        if key.fileobj is self._wake:
                            os.eventfd_read(self._wake.fileno())
                        elif self._listener is not None:
                            self._accept(self._listener)
                    self._look_after()
            finally:
                self._end()

    def start(self) -> None:
        """Call `run` on a thread of its own, and return."""
        self._thread = threading.Thread(target=self._run_logged, name=f"server {self._device.name}")
        self._thread.start()

    def stop(self) -> None:
        """Ask the server to end: requests in flight complete, then the connection is closed and the socket is removed.

        Does not wait. From any thread and from a signal handler.
        """
        self._stopping.set()
        os.eventfd_write(self._wake.fileno(), 1)

    def rest(self, timeout_s: float) -> None:
        """Accept and take nothing more, and wait until every request is answered: what `leave` or `resume` comes after.

        Blocks, on a thread that is not the server's; connections queue meanwhile. Raises `DrainTimeout` when storage
        has not answered after ``timeout_s``, and `SetupError` when there is nothing to hand over; it serves on then.
        """
        if self._listener is None:
            raise SetupError("it serves a single connection and listens on nothing")
        deadline = time.monotonic() + timeout_s
        self._resting = True
        os.eventfd_write(self._wake.fileno(), 1)
        while not self._at_rest():
            if self._stopping.is_set() or time.monotonic() >= deadline:
                self.resume()
                raise DrainTimeout(f"{self.in_flight} requests are still under way after {timeout_s:g} s")
            time.sleep(REST_PAUSE_S)

    def resume(self) -> None:
        """Accept and take again. Does not wait. Any thread."""
        self._resting = False
        session = self._session
        if session is not None:
            session.rest(False)
        os.eventfd_write(self._wake.fileno(), 1)

    def leave(self) -> None:
        """End as `stop` does, but leave the socket's file to whoever listens on the same socket by now."""
        if self._listener is not None:
            self._listener.leave_file()
        self.stop()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread of `start`; False when it still runs after ``timeout_s``."""
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.join()

    def _run_logged(self) -> None:
        try:
            self.run()
        except (VhostUserError, OSError) as error:
            log.error("%s: the server ended: %s", self._device.name, error)

    def _at_rest(self) -> bool:
        session = self._session
        if session is not None:
            session.rest(True)
        quiet = session is None or (session.at_rest and self._with_storage(session) == 0)
        return quiet and not self._accepting and self._waiting is None

    def _with_storage(self, session: Session) -> int:
        """Requests that storage has not answered; those that it failed and that are kept can stay in a region."""
        kept = ("held", "retrying") if session.recoverable else ()
        return self.in_flight - sum(queue.get(key, 0) for queue in self._device.queues.stats() for key in kept)

    def _watch_listener(self, selector: selectors.BaseSelector) -> None:
        wanted = self._listener is not None and not self._resting
        if self._listener is None or wanted == self._accepting:
            return
        if wanted:
            selector.register(self._listener, selectors.EVENT_READ)
        else:
            selector.unregister(self._listener)
        self._accepting = wanted

    def _accept(self, listener: Listener) -> None:
        try:
            transport = listener.accept()
        except OSError as error:  # one connection less, and one reason more to go on
            log.error("%s: a connection could not be accepted: %s", self._device.name, error)
            select.select([self._wake], [], [], ACCEPT_PAUSE_S)
            return
        if self._waiting is not None and self._waiting.peer_hung_up():
            self._waiting.close()  # it has given up, and keeps no place from one that has not
            self._waiting = None
        if self._session is None:
            self._begin(transport)
        elif self._session.peer_left() and self._waiting is None:
            log.info("%s: a front-end waits until the storage of the one before is at rest", self._device.name)
            self._waiting = transport
            self._waiting_until = time.monotonic() + self._drain_timeout_s
        else:
            self._refuse(transport, "another one is connected")

    def _refuse(self, transport: Transport, reason: str) -> None:
        log.warning("%s: a front-end was refused: %s", self._device.name, reason)
        transport.close()

    def _begin(self, transport: Transport) -> None:
        log.info("%s: a front-end connected", self._device.name)
        self._served = True
        try:
            session = Session(
                self._device, transport, drain_timeout_s=self._drain_timeout_s, stop_timeout_s=self._stop_timeout_s
            )
        except (VhostUserError, OSError) as error:
            self._refuse(transport, str(error))
            return
        self._session = session
        self._session_over.clear()
        self._session_thread = threading.Thread(
            target=self._run_session, args=(session,), name=f"session {self._device.name}"
        )
        self._session_thread.start()

    def _run_session(self, session: Session) -> None:
        try:
            session.run()
        except Exception:
            log.exception("%s: the session ended badly", self._device.name)
        finally:
            self._session_over.set()
            os.eventfd_write(self._wake.fileno(), 1)

    def _look_after(self) -> None:
        """See whether the session has ended, and whether the one who waits may begin or has waited enough."""
        if self._session_thread is not None and self._session_over.is_set():
            self._session_thread.join()
            self._session_thread = self._session = None
        if self._waiting is None:
            self._looking = self._session is None and self._device.look_for_heir()
            return
        if self._session is None:
            waiting, self._waiting = self._waiting, None
            self._begin(waiting)
        elif time.monotonic() >= self._waiting_until:
            waiting, self._waiting = self._waiting, None
            self._refuse(waiting, f"storage has not come to rest for {self._drain_timeout_s:.0f} s")

    def _patience(self) -> float | None:
        if self._waiting is not None:
            return max(0.0, self._waiting_until - time.monotonic())
        return LOOK_S if self._looking else None

    def _end(self) -> None:
        if self._session is not None:
            self._session.stop()
        if self._waiting is not None:
            self._refuse(self._waiting, "the server ends")
        if self._listener is not None:
            self._listener.close()
        if self._session_thread is not None:
            self._session_thread.join()
            self._session_thread = self._session = None


def raise_fd_limit(num_queues: int) -> None:
    """Raise the soft limit of open descriptors to what one session may need, as far as the hard limit allows.

    A front-end sends up to 509 regions and three descriptors per ring.
    """
    needed = FDS_PER_REGION * MAX_MEM_SLOTS + FDS_PER_RING * num_queues + SPARE_FDS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed += _count_open(needed if soft == resource.RLIM_INFINITY else min(soft, needed))
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        if wanted < needed:
            log.warning("only %d descriptors may be open: front-ends with much memory may be refused", wanted)


def _count_open(below: int) -> int:
    """How many descriptors under ``below`` are open. Who has given up files cannot list them, so each is asked for, in
    one call: a call for each of them takes longer than all the rest of `Server`."""
    poll = select.poll()
    for fd in range(below):
        poll.register(fd, 0)
    return below - sum(bool(found & select.POLLNVAL) for _, found in poll.poll(0))
