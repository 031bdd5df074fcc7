"""One disk served in the foreground until a signal, or the only front-end's leaving, ends it.

The main thread waits for signals; the server, the session and the control socket have threads of their own. Touches:
everything that serving a disk touches, signals, the service manager.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from vhostuser import systemd
from vhostuser.backend import Server
from vhostuser.blk import BlockDevice
from vhostuser.cli import CONTROL_SUFFIX
from vhostuser.disks import Disk, Faults, FaultyDisk, open_disk
from vhostuser.errors import OperatorError, UsageError
from vhostuser.socketpath import MAX_PATH
from vhostuser.transport import Listener, Transport, adopt, listen

if TYPE_CHECKING:
    from vhostuser.control import ControlServer

STOPS = (signal.SIGTERM, signal.SIGINT)
NO_CONTROL = "none"
DRAIN_TIMEOUT_S = 30.0

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
    poll_us: int = 0
    socket_mode: int = 0o600
    socket_group: str | None = None
    lock: bool = True
    control: str | None = None
    """The control socket: a path, "none", or None for the disk's own socket with ``.ctl`` added."""
    inject: str | None = None
    once: bool = False
    """End when the first front-end has left."""
    socket_option: str = "--socket"
    """How the program calls ``socket``, for messages."""

    def run(self) -> None:
        """Serve until the end. Raises `OperatorError` or `OSError` when it cannot begin, or listening fails later."""
        with ExitStack() as stack, Signals() as signals:
            disk = stack.enter_context(self._open_disk())
            device = self._make_device(disk)
            stack.callback(device.close)
            endpoint, place = self._make_endpoint()
            stack.callback(endpoint.close)
            server = Server(device, endpoint, drain_timeout_s=DRAIN_TIMEOUT_S, once=self.once)
            control = self._make_control(device)
            if control is not None:
                stack.enter_context(control)
            with running(server, signals) as failures:
                size = f"{device.size} bytes, {'read-only, ' if device.read_only else ''}{self.queues} queues"
                log.info("%s: serving %s on %s", device.name, size, place)
                systemd.notify(systemd.READY)
                signals.obey(device, server)
            if failures:
                raise failures[0]
            log.info("%s: stopped", device.name)

    def _open_disk(self) -> Disk:
        faults = Faults.parse(self.inject) if self.inject is not None else None
        disk = open_disk(
            self.disk, read_only=self.read_only, cache=self.cache, engine=self.engine, lock=self.lock
        )  # fmt: skip
        return FaultyDisk(disk, faults) if faults is not None else disk

    def _make_device(self, disk: Disk) -> BlockDevice:
        return BlockDevice(
            disk,
            num_queues=self.queues,
            num_workers=self.threads,
            serial=self.serial,
            block_size=self.block_size,
            physical_block_size=self.physical_block_size,
            poll_us=self.poll_us,
            **({} if self.seg_max is None else {"seg_max": self.seg_max}),
        )

    def _make_endpoint(self) -> tuple[Listener | Transport, str]:
        """What to serve on, and its name for a person."""
        if self.socket is not None and self.fd is not None:
            raise UsageError("--fd", f"it excludes {self.socket_option}", "Use one of the two")
        if self.fd is not None:
            return adopt(self.fd), f"file descriptor {self.fd}"
        if self.socket is not None:
            return listen(self.socket, mode=self.socket_mode, group=self.socket_group), self.socket
        passed = systemd.passed_fds()
        if len(passed) != 1:
            cause = f"the service manager passed {len(passed)} instead of one" if passed else "none is named"
            raise UsageError(
                "socket", cause, f"Say {self.socket_option} PATH or --fd N, or use one systemd socket unit"
            )
        return adopt(passed[0].fd), f"the service manager's socket {passed[0].name}"

    def _make_control(self, device: BlockDevice) -> ControlServer | None:
        path = self.control if self.control is not None else self._default_control()
        if path is None or path == NO_CONTROL:
            return None
        from vhostuser.control import ControlServer, disk_methods  # not needed without one

        return ControlServer(listen(path, mode=0o600), disk_methods(device, version=version("vhostuser")))

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


class Signals:
    """Turns signals into bytes on a socket, so that one thread can wait for them and for the server's end."""

    ENDED = b"\0"

    def __init__(self) -> None:
        self._inside, self._outside = socket.socketpair()
        self._outside.setblocking(False)
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        signal.set_wakeup_fd(self._outside.fileno(), warn_on_full_buffer=False)
        for number in (*STOPS, signal.SIGHUP):
            self._before[number] = signal.signal(number, lambda _number, _frame: None)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() returned fits signal()
        self._inside.close()
        self._outside.close()

    def server_ended(self) -> None:
        """Ends `obey`. Any thread."""
        self._outside.send(self.ENDED)

    def obey(self, device: BlockDevice, server: Server) -> None:
        """Wait for the server's end.

        SIGHUP looks at the size again; SIGTERM and SIGINT stop, and a second one ends the process where it is.
        """
        stopping = False
        while True:
            for number in self._inside.recv(64):
                if number == 0:
                    return
                if number == signal.SIGHUP:
                    refresh(device)
                elif stopping:
                    log.warning("%s: ends at once, storage may still work", device.name)
                    os._exit(128 + number)
                else:
                    stopping = True
                    systemd.notify(systemd.STOPPING)
                    server.stop()


def refresh(device: BlockDevice) -> None:
    """SIGHUP: the storage may have another size now."""
    try:
        if device.refresh() is None:
            log.info("%s: the size is what it was, %d bytes", device.name, device.size)
    except (OperatorError, OSError) as error:
        log.error("%s: its size could not be read again: %s", device.name, error)


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
