"""Signals for a program that serves, and a limit for how long its end may take. Touches: signals, the process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

STOPS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


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

    def obey(self, refresh: Callable[[], None], stop: Callable[[], None]) -> None:
        """Wait for the server's end.

        SIGHUP calls ``refresh``; SIGTERM and SIGINT call ``stop``, and a second one ends the process where it is.
        """
        stopping = False
        while True:
            for number in self._inside.recv(64):
                if number == 0:
                    return
                if number == signal.SIGHUP:
                    refresh()
                elif stopping:
                    log.warning("a second signal: the program ends at once, storage may still work")
                    end_here(128 + number)
                else:
                    stopping = True
                    stop()


class Limit:
    """Calls a function when the end of the program takes longer than it may, whatever its threads wait for.

    The function ends the process with `end_here`: threads that wait for storage would hold up an orderly exit.
    """

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def start(self, seconds: float, give_up: Callable[[], None]) -> None:
        """Let the end take so long from now on; ``give_up`` is called on a thread of its own."""
        self._timer = threading.Timer(seconds, give_up)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """The end came in time. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()


def end_here(code: int) -> None:
    """End the process now, with every thread where it is and every descriptor still open until then."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
