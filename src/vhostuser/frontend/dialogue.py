"""Requests and their answers on the main socket, one at a time and each with a time limit. Touches one connection."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Sequence
from typing import Final

from vhostuser.errors import BackendRefused, PeerGone, RemoteProtocolError, RemoteRingError, VhostUserError
from vhostuser.fds import Fd
from vhostuser.protocol import (
    U64,
    Connection,
    FrontendRequest,
    Message,
    Nothing,
    Payload,
    ProtocolFeature,
    Reply,
    Role,
    name_of,
)
from vhostuser.transport import Transport

EMPTY: Final = Nothing()


class Dialogue:
    """The front-end's side of one main socket. Any thread: a second request waits until the first is answered.

    Once anything goes wrong with the connection it is over: its descriptor reads as hung up, and every later request
    fails with the same cause.
    """

    def __init__(self, transport: Transport, *, timeout_s: float) -> None:
        """Takes ``transport``. ``timeout_s`` is how long the back-end may take for an answer, unless told otherwise."""
        self.timeout_s: Final = timeout_s
        self.connection: Final[Connection[Fd]] = Connection(Role.FRONTEND)
        self._transport = transport
        self._lock = threading.Lock()
        self._failure = threading.Lock()
        self._error: VhostUserError | None = None

    def fileno(self) -> int:
        """The descriptor, to watch for a hang-up; -1 once closed."""
        return self._transport.fileno()

    @property
    def transport(self) -> Transport:
        """The connection itself, for who takes turns with this: nothing may be asked here meanwhile."""
        return self._transport

    @property
    def acks(self) -> bool:
        """Whether the back-end acknowledges messages."""
        return ProtocolFeature.REPLY_ACK in self.connection.protocol_features

    @property
    def error(self) -> VhostUserError | None:
        """Why the connection is over; None while it is good."""
        return self._error

    def ask(
        self, request: int, payload: Payload = EMPTY, fds: Sequence[Fd] = (), *, timeout_s: float | None = None
    ) -> Reply[Fd]:
        """Send a message that has its own reply, and return that. Descriptors of the reply are the caller's.

        Raises `PeerGone` when none comes in time, `RemoteProtocolError` when another one does.
        """
        reply = self._exchange(Message(request, payload, tuple(fds)), timeout_s)
        if reply is None:
            raise TypeError(f"{name_of(request)} has no reply")
        return reply

    def number(self, request: int) -> int:
        """`ask` for something that is answered by one integer."""
        answer = self.ask(request).payload
        return answer.value if isinstance(answer, U64) else 0

    def tell(
        self, request: int, payload: Payload = EMPTY, fds: Sequence[Fd] = (), *, timeout_s: float | None = None
    ) -> None:
        """Send a message that changes something, and wait for its acknowledgement if the back-end sends any.

        Raises `BackendRefused` when it says that it failed.
        """
        reply = self._exchange(Message(request, payload, tuple(fds), self.acks), timeout_s)
        if reply is not None and isinstance(reply.payload, U64) and reply.payload.value:
            raise BackendRefused(name_of(request), reply.payload.value)

    def settle(self) -> None:
        """Return once everything told before was carried out: at once when it was acknowledged.

        Otherwise the answer to GET_FEATURES is the sign, as QEMU and SPDK do it.
        """
        if not self.acks:
            self.ask(FrontendRequest.GET_FEATURES)

    def fail(self, error: VhostUserError) -> None:
        """End the connection: it is over for every thread, on account of ``error`` unless of something before."""
        with self._failure:
            if self._error is None:
                self._error = error
        self._transport.shutdown()

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.fail(PeerGone("the connection is closed"))
        with self._lock:
            self.connection.close()
            self._close_refused()
            self._transport.close()

    def _exchange(self, message: Message[Fd], timeout_s: float | None) -> Reply[Fd] | None:
        with self._lock:
            if self._error is not None:
                raise again(self._error)
            data, fds = self.connection.send(message)
            try:
                self._transport.send(data, fds)
                if not self.connection.awaits_reply:
                    return None
                return self._receive(name_of(message.request), self.timeout_s if timeout_s is None else timeout_s)
            except (PeerGone, RemoteProtocolError) as error:
                self.fail(error)
                if self._error is error:
                    raise
                raise again(self._error or error) from error
            except OSError as error:
                gone = PeerGone(f"{name_of(message.request)} cannot be exchanged: {os.strerror(error.errno or 0)}")
                self.fail(gone)
                raise gone from error

    def _receive(self, name: str, timeout_s: float) -> Reply[Fd]:
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._transport.fileno(), select.POLLIN)
        while True:
            try:
                event = self.connection.next_event()
            finally:
                self._close_refused()
            if isinstance(event, Reply):
                return event
            if self.connection.closed:
                raise PeerGone(f"the back-end closed the connection and did not answer {name}")
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise PeerGone(f"the back-end did not answer {name} within {timeout_s:g} s")
            self.connection.receive(*self._transport.receive(self.connection.want))

    def _close_refused(self) -> None:
        for fd in self.connection.refused_fds():
            fd.close()


def again(error: VhostUserError) -> VhostUserError:
    """The same failure, to be raised once more: an exception that is raised twice collects both tracebacks."""
    match error:
        case RemoteProtocolError() | RemoteRingError() | PeerGone():
            return type(error)(str(error))
    return PeerGone(str(error))
