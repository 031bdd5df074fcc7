"""The control socket: what an operator asks of a running disk. Touches its own socket and calls the device.

JSON-RPC 2.0 over a Unix socket, one object, or one batch, per line in both directions. Whoever may write to the socket
is an operator; it is made with mode 0600.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Self

from vhostuser import jsonrpc
from vhostuser.errors import PeerGone, RemoteProtocolError, VhostUserError
from vhostuser.fds import Fd
from vhostuser.jsonrpc import INVALID_REQUEST, ControlError, Method, Offer
from vhostuser.transport import Listener, Transport, connect

if TYPE_CHECKING:
    from types import TracebackType

MAX_LINE: Final = 65536
"""Bytes of one request, its end of line included."""
MAX_CLIENTS: Final = 16
MAX_ANSWER: Final = 16 << 20
"""Bytes of one answer that a client takes: 256 queues of statistics fit well."""
SEND_TIMEOUT_S: Final = 10.0
ACCEPT_PAUSE_S: Final = 1.0
"""How long to wait when no connection can be accepted, as when there are too many open files."""

log = logging.getLogger(__name__)


class ControlServer:
    """Answers calls from several clients at a time, each on a thread of its own."""

    def __init__(self, listener: Listener, methods: Mapping[str, Method]) -> None:
        """Takes ``listener``. Methods are called from the threads of the clients, possibly at the same time."""
        self._listener = listener
        self._methods = dict(methods)
        self._lock = threading.Lock()
        self._clients: dict[Transport, threading.Thread] = {}
        self._stopping = False
        self._wake = Fd(os.eventfd(0, os.EFD_CLOEXEC))
        self._thread = threading.Thread(target=self._accept_all, name="control")

    def start(self) -> None:
        """Begin to answer, on threads of this object, and return."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering, disconnect every client and remove the socket; waits for calls that are under way."""
        with self._lock:
            self._stopping = True
            clients = dict(self._clients)
        if not self._wake.closed:
            os.eventfd_write(self._wake.fileno(), 1)
        if self._thread.is_alive():
            self._thread.join()
        for transport, thread in clients.items():
            transport.shutdown()
            thread.join()
        self._listener.close()
        self._wake.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _accept_all(self) -> None:
        while not self._stopping:
            ready, _, _ = select.select([self._listener.fileno(), self._wake.fileno()], [], [])
            if self._listener.fileno() in ready:
                try:
                    self._accept()
                except OSError as error:
                    log.warning("control socket: a client could not be accepted: %s", error)
                    select.select([self._wake], [], [], ACCEPT_PAUSE_S)

    def _accept(self) -> None:
        transport = self._listener.accept(send_timeout_s=SEND_TIMEOUT_S)
        with self._lock:
            if self._stopping or len(self._clients) >= MAX_CLIENTS:
                log.warning("control socket: a client was refused: %d are connected", len(self._clients))
                transport.close()
                return
            thread = threading.Thread(target=self._serve, args=(transport,), name="control client")
            self._clients[transport] = thread
            thread.start()

    def _serve(self, transport: Transport) -> None:
        lines = _Lines(transport)
        offers: list[Offer] = []
        try:
            for line in lines:
                known = len(offers)
                reply = jsonrpc.answer(line, self._methods, offers)
                with ExitStack() as sent:
                    fds = [sent.enter_context(fd) for offer in offers[known:] for fd in offer.fds]
                    lines.timeout_s = min((offer.patience_s for offer in offers), default=None)
                    if reply is not None:
                        transport.send(reply + b"\n", fds)
        except _LineTooLong:
            self._complain(transport)
        except (PeerGone, RemoteProtocolError, OSError) as error:
            log.info("control socket: a client was lost: %s", error)
        finally:
            for offer in offers:
                offer.over()
            with self._lock:
                del self._clients[transport]
                transport.close()

    def _complain(self, transport: Transport) -> None:
        error = ControlError(INVALID_REQUEST, f"a request may have {MAX_LINE} bytes")
        try:
            transport.send(jsonrpc.refusal(error) + b"\n")
        except PeerGone:
            return


class ControlClient:
    """Calls methods over a control socket, one at a time. Not for several threads."""

    def __init__(self, path: str, *, timeout_s: float = 10.0) -> None:
        """Connect to the socket at ``path``. Raises `OperatorError` when nobody listens there.

        ``timeout_s`` bounds connecting and every wait for an answer.
        """
        self._timeout_s = timeout_s
        self._transport = connect(path, timeout_s, send_timeout_s=timeout_s)
        self._lines = _Lines(self._transport, limit=MAX_ANSWER, timeout_s=timeout_s)
        self._calls = 0

    def call(self, method: str, **params: object) -> object:
        """Return the result of ``method``. Raises `ControlError` when the other side says so, `PeerGone` when it is
        silent or gone, `RemoteProtocolError` when it does not speak JSON-RPC. Descriptors that come with it are kept
        for `take_fds`."""
        self._calls += 1
        self._transport.send(jsonrpc.request(self._calls, method, params) + b"\n")
        try:
            line = next(self._lines, None)
        except _LineTooLong as error:
            raise RemoteProtocolError(f"the answer is not JSON-RPC: {error}") from error
        if line is None:
            raise PeerGone("the control socket was closed before the answer came")
        return jsonrpc.result(line, self._calls)

    def take_fds(self) -> list[Fd]:
        """Take over the descriptors that came with answers so far."""
        fds, self._lines.fds = self._lines.fds, []
        return fds

    def close(self) -> None:
        """Disconnect, and close descriptors that nobody took. Idempotent."""
        for fd in self.take_fds():
            fd.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _LineTooLong(VhostUserError):  # noqa: N818  named for what it finds
    """A line that does not end within the limit."""


class _Lines:
    """The lines that the peer sends, without their ends; an unfinished last one is dropped."""

    def __init__(self, transport: Transport, *, limit: int = MAX_LINE, timeout_s: float | None = None) -> None:
        self._transport = transport
        self._limit = limit
        self._ready: list[bytes] = []
        self._rest = b""
        self.timeout_s = timeout_s
        """How long to wait for anything to come."""
        self.fds: list[Fd] = []
        """What came with the lines, when a client wants it."""
        self._keep_fds = timeout_s is not None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        while True:
            line = self._ready.pop(0) if self._ready else None
            if len(self._rest if line is None else line) >= self._limit:
                raise _LineTooLong(f"a line has more than {self._limit} bytes")
            if line is None:
                self._receive()
            elif line.strip():
                return line

    def _receive(self) -> None:
        if self.timeout_s is not None and not select.select([self._transport], [], [], self.timeout_s)[0]:
            raise PeerGone(f"there was no answer for {self.timeout_s:g} s")
        data, fds = self._transport.receive(self._limit)
        self.fds += fds
        if not self._keep_fds:
            while self.fds:
                self.fds.pop().close()
        if not data:
            raise StopIteration
        *self._ready, self._rest = (self._rest + data).split(b"\n")
