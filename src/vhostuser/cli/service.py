"""One disk served in the foreground until a signal, or the only front-end's leaving, ends it.

The main thread waits for signals; the server, the session and the control socket have threads of their own. Touches:
everything that serving a disk touches, signals, the service manager.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhostuser import __version__, systemd
from vhostuser.backend import Server
from vhostuser.blk import BlockDevice, ErrorAction, ErrorPolicy, RateLimit
from vhostuser.cli import CONTROL_SUFFIX
from vhostuser.cli.signals import Limit, Signals, end_here
from vhostuser.disks import Disk, open_disk
from vhostuser.errors import OperatorError, UsageError
from vhostuser.fds import Fd
from vhostuser.sandbox import Sandbox
from vhostuser.socketpath import MAX_PATH, written
from vhostuser.transport import Listener, Transport, adopt, listen

if TYPE_CHECKING:
    from vhostuser.control import ControlServer

NO_CONTROL = "none"
DRAIN_TIMEOUT_S = 30.0
QUIET_S = 1.0
"""How long a connection may wait for the image before it is turned away."""
LEAVE_AFTER_S = 1.0
"""How long storage may take after a signal when nothing is lost by leaving earlier, in seconds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What is to be served, where, and how. Sizes are in bytes; None leaves the choice to the package."""

    disk: str
    socket: str | None = None
    fd: int | None = None
    """An inherited socket, listening or connected. Without this and ``socket`` the service manager passes one."""
    queues: int = 1
    threads: int | None = None
    read_only: bool = False
    serial: str = ""
    block_size: int | None = None
    physical_block_size: int | None = None
    seg_max: int | None = None
    cache: str = "writeback"
    engine: str = "auto"
    poll_us: int | None = None
    on_error: str = "report"
    on_enospc: str = "report"
    """What becomes of failed requests: a value of `ErrorAction`."""
    retry_for: float | None = None
    """Seconds that a failed request is tried again; None: for ever."""
    rate_limit: str | None = None
    """A text for `RateLimit.parse`."""
    socket_mode: int = 0o600
    socket_group: str | None = None
    lock: bool = True
    control: str | None = None
    """The control socket: a path, "none", or None for the disk's own socket with ``.ctl`` added."""
    inject: str | None = None
    once: bool = False
    """End when the first front-end has left."""
    stop_timeout: float = 10.0
    """Seconds that storage may take to come to rest after a signal, or for a successor."""
    lock_timeout: float = 30.0
    """Seconds to wait for a predecessor, or anybody else, to let go of the image."""
    incoming: bool = False
    """Another server may have the image until the first ring starts."""
    upgrade: bool = False
    """Take the sockets over from the server that runs."""
    sandbox: str = "on"
    """One of `vhostuser.sandbox.MODES`."""
    socket_option: str = "--socket"
    """How the program calls ``socket``, for messages."""

    def run(self) -> None:
        """Serve until the end. Raises `OperatorError` or `OSError` when it cannot begin, or listening fails later.

        Does not return when storage hangs at the end: the process ends then, at the latest `stop_timeout` seconds after
        the signal.
        """
        limit, sandbox = Limit(), Sandbox(self.sandbox)
        with ExitStack() as stack:
            manager = stack.enter_context(systemd.Manager())
            stack.callback(limit.cancel)  # the last thing
            named, endpoint, control = self._take_over() if self.upgrade else self._inherited()
            for one in (endpoint, control):
                if one is not None:
                    stack.callback(one.close)
            # Until there is something to clean up, a signal may end the process where it is.
            disk = stack.enter_context(self._open_disk(self._place(endpoint), endpoint))
            signals = stack.enter_context(Signals())
            if endpoint is None:
                assert self.socket is not None
                endpoint = listen(self.socket, mode=self.socket_mode, group=self.socket_group)
                stack.callback(endpoint.close)
            if control is None and (path := self._control_path()) is not None:
                control = listen(path, mode=0o600)
                stack.callback(control.close)
            answering = self._answering(control) if control is not None else None
            listeners = [one for one in (endpoint, control) if isinstance(one, Listener)]
            # No thread before, no file after; then the queues' threads and rings; then no other system call any more.
            sandbox.give_up_files(listener.path for listener in listeners)
            device = self._make_device(disk)
            stack.callback(device.close)
            server = Server(
                device, endpoint, drain_timeout_s=DRAIN_TIMEOUT_S,
                stop_timeout_s=self.stop_timeout + DRAIN_TIMEOUT_S, once=self.once,
            )  # fmt: skip
            sandbox.give_up_calls()
            if answering is not None:
                stack.enter_context(answering(device, server, endpoint))
            with running(server, signals) as failures:
                size = f"{device.size} bytes, {'read-only, ' if device.read_only else ''}{self.queues} queues"
                log.info("%s: serving %s on %s", device.name, size, named)
                manager.notify(systemd.READY)

                def stop() -> None:
                    manager.notify(systemd.STOPPING)
                    self._stop(device.name, server, listeners, limit)

                signals.obey(lambda: refresh(device), stop)
            if failures:
                raise failures[0]
            log.info("%s: stopped", device.name)

    def _open_disk(self, place: str, inherited: Listener | Transport | None = None, *, lock: bool = True) -> Disk:
        """Open it for serving on ``place``; connections at an ``inherited`` listener do not wait longer than a second
        for the end of a predecessor."""
        if self.incoming and not self.lock:
            raise UsageError("--incoming", "images are handed over by their locks", "Leave out --no-lock")
        spoil = self._injector()
        with turning_away(inherited):
            disk = open_disk(
                self.disk, read_only=self.read_only, cache=self.cache, engine=self.engine,
                lock=self.lock and lock, lock_timeout_s=self.lock_timeout, place=place,
                incoming=self.incoming,
            )  # fmt: skip
        if self.incoming and disk.volatile:
            raise UsageError(disk.name, "its content is no other server's", "Serve a file to have it handed over")
        return spoil(disk)

    def _injector(self) -> Callable[[Disk], Disk]:
        """What puts the faults that are asked for before a disk. Raises `UsageError` for a text that makes no sense."""
        if self.inject is None:
            return lambda disk: disk
        from vhostuser.disks.faulty import Faults, FaultyDisk  # for testers only

        faults = Faults.parse(self.inject)
        return lambda disk: FaultyDisk(disk, faults)

    def _make_device(self, disk: Disk) -> BlockDevice:
        return BlockDevice(
            disk,
            num_queues=self.queues,
            num_workers=self.threads,
            serial=self.serial,
            block_size=self.block_size,
            physical_block_size=self.physical_block_size,
            errors=self._error_policy(),
            rate_limit=RateLimit.parse(self.rate_limit) if self.rate_limit is not None else None,
            **({} if self.seg_max is None else {"seg_max": self.seg_max}),
            **({} if self.poll_us is None else {"poll_us": self.poll_us}),
        )

    def _error_policy(self) -> ErrorPolicy:
        policy = ErrorPolicy(ErrorAction(self.on_error), ErrorAction(self.on_enospc), self.retry_for)
        if policy.retry_for_s is not None and ErrorAction.RETRY not in (policy.on_error, policy.on_enospc):
            raise UsageError("--retry-for", "nothing is tried again", "Add --on-error retry or --on-enospc retry")
        if policy.keeps and self.cache == "writethrough":
            log.warning(
                "%s: with --cache writethrough a failed write is always told to the guest; use --cache none to keep it",
                self.disk,
            )
        return policy

    def _inherited(self) -> tuple[str, Listener | Transport | None, Listener | None]:
        """What to serve on, for a person, and the sockets for disk and control that this process was started with."""
        if self.socket is not None and self.fd is not None:
            raise UsageError("--fd", f"it excludes {self.socket_option}", "Use one of the two")
        if self.fd is not None:
            return f"file descriptor {self.fd}", adopt(self.fd), None
        if self.socket is not None:
            return self.socket, None, None
        passed = systemd.passed_fds()
        if len(passed) != 1:
            cause = f"the service manager passed {len(passed)} instead of one" if passed else "none is named"
            raise UsageError(
                "socket", cause, f"Say {self.socket_option} PATH or --fd N, or use one systemd socket unit"
            )
        return f"the service manager's socket {passed[0].name}", adopt(passed[0].fd), None

    def _place(self, endpoint: Listener | Transport | None) -> str:
        """Where front-ends find it, however that came about: what those who read one image for them go by."""
        return written(self.socket) if self.socket is not None else endpoint.place if endpoint is not None else ""

    def _take_over(self) -> tuple[str, Listener, Listener]:
        """Have the running server come to rest and end, once everything that can be tried before was tried."""
        from vhostuser.succession import Predecessor  # only here

        path = self._control_path()
        if self.fd is not None or path is None:
            raise UsageError(
                "--upgrade", "it needs the control socket of the running server",
                "Start this one with --socket or --control as the running one was",
            )  # fmt: skip
        with closing(Predecessor(path, timeout_s=self.stop_timeout)) as predecessor:
            with self._open_disk("", lock=False) as disk, closing(self._make_device(disk)) as device:
                if disk.volatile:
                    raise UsageError(disk.name, "its content ends with the running server", "Serve a file instead")
                predecessor.check(device, incoming=self.incoming)
            disk_socket, control = predecessor.take_over(self.socket)
        return f"{disk_socket.place}, taken over", disk_socket, control

    def _answering(self, control: Listener) -> Callable[[BlockDevice, Server, Listener | Transport], ControlServer]:
        """Read what answering calls needs, for nothing is read in the sandbox, and return what makes the server."""
        from vhostuser.control import ControlServer  # not needed without one
        from vhostuser.handover import Handover
        from vhostuser.methods import disk_methods

        def make(device: BlockDevice, server: Server, endpoint: Listener | Transport) -> ControlServer:
            methods = disk_methods(device, version=__version__)
            if isinstance(endpoint, Listener):
                methods |= Handover(device.name, server, endpoint, control).methods()
            return ControlServer(control, methods)

        return make

    def _stop(self, name: str, server: Server, listeners: list[Listener], limit: Limit) -> None:
        """A signal asks for the end. What storage does not answer in time is left, in the in-flight region if there is
        one, and then the wait is short: whoever comes next waits for the image and does it again."""
        kept = server.recoverable
        seconds = min(self.stop_timeout, LEAVE_AFTER_S) if kept else self.stop_timeout

        def give_up() -> None:
            """The connection stays open until the process has ended: nobody comes next before that."""
            left = server.in_flight
            where = "stay in the in-flight region" if kept else "are lost, for the front-end keeps no in-flight region"
            say = log.info if kept else log.error
            say("%s: stopped after %g s; %d requests that storage has not answered %s", name, seconds, left, where)
            for listener in listeners:
                listener.remove_file()
            end_here(1 if left and not kept else 0)

        limit.start(seconds, give_up)
        server.stop()

    def _control_path(self) -> str | None:
        if self.control == NO_CONTROL:
            return None
        return self.control if self.control is not None else self._default_control()

    def _default_control(self) -> str | None:
        """Beside the disk's socket; none, and a line in the log, where that cannot be."""
        if self.socket is None:
            log.info("%s: no control socket: name one with --control PATH", self.disk)
            return None
        path = self.socket + CONTROL_SUFFIX
        if len(os.fsencode(path)) > MAX_PATH:
            log.warning("%s: no control socket: the path %s is too long, name one with --control PATH", self.disk, path)
            return None
        return path


def refresh(device: BlockDevice) -> None:
    """SIGHUP: the storage may have another size now."""
    try:
        if device.refresh() is None:
            log.info("%s: the size is what it was, %d bytes", device.name, device.size)
    except (OperatorError, OSError) as error:
        log.error("%s: its size could not be read again: %s", device.name, error)


@contextmanager
def turning_away(endpoint: Listener | Transport | None) -> Iterator[None]:
    """After a second of this, closes every connection to ``endpoint``, if that listens: a hypervisor whose connection
    is left waiting stops its whole guest for it, and tries again by itself when it is closed."""
    if not isinstance(endpoint, Listener):
        yield
        return
    with Fd(os.eventfd(0, os.EFD_CLOEXEC)) as over:

        def run() -> None:
            if select.select([over.fileno()], [], [], QUIET_S)[0]:
                return
            watched = [endpoint.fileno(), over.fileno()]
            while over.fileno() not in select.select(watched, [], [])[0]:
                endpoint.accept().close()
                log.info("a front-end was turned away: the image is still waited for")

        thread = threading.Thread(target=run, name="turning away")
        thread.start()
        try:
            yield
        finally:
            os.eventfd_write(over.fileno(), 1)
            thread.join()


@contextmanager
def running(server: Server, signals: Signals) -> Iterator[list[Exception]]:
    """Runs ``server`` on a thread of its own meanwhile; yields what made it fail, to be read afterwards."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            server.run()
        except Exception as error:
            failures.append(error)
        finally:
            signals.server_ended()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        yield failures
    finally:
        server.stop()
        thread.join()
