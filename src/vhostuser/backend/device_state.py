"""The state of a device on its way out or in. Touches the descriptor it was given, on a thread of its own.

A front-end moves the bytes while it waits for nothing else, or while it asks us other things: the session goes on. What
was sent is looked at when CHECK_DEVICE_STATE comes, on the session's thread.

Spec: vhost-user: Migrating back-end state.
"""

from __future__ import annotations

import os
import select
import stat
import threading
import time
from typing import TYPE_CHECKING, Final

from vhostuser.errors import ConfigRefused, SetupError
from vhostuser.fds import Fd
from vhostuser.protocol import Direction

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhostuser.backend.device import Device
    from vhostuser.backend.vrings import Vrings

MAX_STATE: Final = 1 << 20
"""The longest state that is taken, in bytes."""

PIECE: Final = 1 << 16
"""How much is moved at once, in bytes."""

ASK_S: Final = 0.05
"""How often one who waits is asked whether to wait on."""


class Transfer:
    """One state, out of or into one descriptor."""

    def __init__(self, fd: Fd, state: bytes | None) -> None:
        """Takes ``fd``. ``state``: what is written there; None: it is read there, to its end.

        Raises `SetupError` for what is neither a pipe, a socket nor a file.
        """
        try:
            kind = os.fstat(fd.fileno()).st_mode
            if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or stat.S_ISREG(kind)):
                raise SetupError("the state goes through a pipe, a socket or a file, and this descriptor is none")
            os.set_blocking(fd.fileno(), False)
            self._cancel = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except BaseException:
            fd.close()
            raise
        self._fd = fd
        self._over = threading.Event()
        self._error: str | None = None
        self.received = b"" if state is None else None
        """What was read; None for a state that goes out."""
        self._thread = threading.Thread(target=self._run, args=(state,), name="device state")
        self._thread.start()

    def wait(self, timeout_s: float, give_up: Callable[[], bool]) -> str | None:
        """Wait for the end of it, or until it is to be given up; what went wrong, or None."""
        deadline = time.monotonic() + timeout_s
        while not self._over.wait(ASK_S):
            if give_up():
                return "it was not all moved when the connection ended"
            if time.monotonic() >= deadline:
                return f"it was not all moved after {timeout_s:g} s"
        return self._error

    def close(self) -> None:
        """End it where it is. Does not wait for the peer."""
        os.eventfd_write(self._cancel.fileno(), 1)
        self._thread.join()
        self._cancel.close()

    def _run(self, state: bytes | None) -> None:
        try:
            if state is None:
                self._read()
            else:
                self._write(state)
        except OSError as error:
            self._error = f"its descriptor fails: {os.strerror(error.errno or 0)}"
        finally:
            self._fd.close()
            self._over.set()

    def _write(self, state: bytes) -> None:
        left = memoryview(state)
        while left and self._ready(select.POLLOUT):
            try:
                left = left[os.write(self._fd.fileno(), left[:PIECE]) :]
            except BlockingIOError:
                continue
        if left:
            self._error = "it was given up before all was written"

    def _read(self) -> None:
        pieces: list[bytes] = []
        size = 0
        while self._ready(select.POLLIN):
            try:
                piece = os.read(self._fd.fileno(), PIECE)
            except BlockingIOError:
                continue
            if not piece:
                self.received = b"".join(pieces)
                return
            pieces.append(piece)
            size += len(piece)
            if size > MAX_STATE:
                self._error = f"it is longer than {MAX_STATE} bytes"
                return
        self._error = "it was given up before its end"

    def _ready(self, event: int) -> bool:
        """Wait until something can be moved; False when it is no longer wanted."""
        poll = select.poll()
        poll.register(self._fd.fileno(), event)
        poll.register(self._cancel.fileno(), select.POLLIN)
        return self._cancel.fileno() not in dict(poll.poll())


class DeviceState:
    """SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE of one connection."""

    def __init__(self, device: Device, rings: Vrings, *, timeout_s: float) -> None:
        """``timeout_s``: how long CHECK_DEVICE_STATE may wait for the peer to move the rest."""
        self._device = device
        self._rings = rings
        self._timeout_s = timeout_s
        self._transfer: Transfer | None = None

    def begin(self, direction: int, fd: Fd) -> None:
        """Begin to move the state through ``fd``, which it takes; another transfer that was begun is given up.

        Raises `SetupError` while a ring runs, and for a descriptor that will not do.
        """
        with fd:
            self._check_stopped()
            self.close()
            state = self._device.save_state() if direction == Direction.SAVE else None
            self._transfer = Transfer(Fd(fd.detach()), state)

    def check(self, give_up: Callable[[], bool]) -> None:
        """Wait for the end of the transfer unless it is to be given up, and take what came.

        Raises `ConfigRefused` when it failed or is not taken, `SetupError` when there is none or a ring runs.
        """
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise SetupError("no state was to be moved")
        try:
            error = transfer.wait(self._timeout_s, give_up)
            if error is not None:
                raise ConfigRefused(f"the state was not moved: {error}")
            if transfer.received is not None:
                self._check_stopped()
                self._device.load_state(transfer.received)
        finally:
            transfer.close()

    def close(self) -> None:
        """Give up a transfer that is under way. Idempotent."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.close()

    def _check_stopped(self) -> None:
        if self._rings.running:
            raise SetupError("a ring runs: the state is moved while all are stopped")
