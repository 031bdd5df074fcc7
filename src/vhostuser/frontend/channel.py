"""The back-end channel, served: what the back-end asks of the front-end. Touches one socket pair and one thread.

Every message is answered before anything is asked on the main socket on its account: a back-end that waits for the
answer to CONFIG_CHANGE_MSG could not answer our GET_CONFIG, and neither would ever go on.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable
from typing import Final

from vhostuser.errors import LocalProtocolError, PeerGone, RemoteProtocolError, VhostUserError
from vhostuser.fds import Fd
from vhostuser.frontend.queue import eventfd
from vhostuser.protocol import (
    BackendRequest,
    Connection,
    Iotlb,
    IotlbType,
    Message,
    Refused,
    Role,
    describe,
    name_of,
)
from vhostuser.transport import Transport

log = logging.getLogger(__name__)


class BackendChannel:
    """Answers the back-end on a thread of its own, which never ends the connection: a broken channel is only closed.

    CONFIG_CHANGE_MSG is acknowledged, then ``config_changed`` runs. A miss of the IOTLB is answered by what
    ``translate`` says. Everything else is refused.
    """

    def __init__(
        self,
        main: Connection[Fd],
        *,
        config_changed: Callable[[], None],
        translate: Callable[[Iotlb], bool],
        send_timeout_s: float,
    ) -> None:
        """``main`` is the connection whose channel this is. ``theirs`` is to be sent with SET_BACKEND_REQ_FD.

        ``translate`` returns whether the back-end has the translation now.
        """
        self._transport, self.theirs = Transport.pair(send_timeout_s=send_timeout_s)
        self._connection: Connection[Fd] = Connection(Role.FRONTEND, nested=True, main=main)
        self._config_changed = config_changed
        self._translate = translate
        self._wake: Final = eventfd()
        self._ending = threading.Lock()
        self._serves = False  # the descriptors are the thread's
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="back-end channel", daemon=True)

    @property
    def serving(self) -> bool:
        """Whether the caller is the thread of the channel."""
        return threading.current_thread() is self._thread

    @property
    def running(self) -> bool:
        """Whether the thread of the channel has not ended."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to serve."""
        self._serves = True
        self._thread.start()

    def close(self, *, wait: bool = True) -> None:
        """End the thread and close both ends. Waits for what the thread does now; not for itself to call. Idempotent.

        Without ``wait`` it closes what is its own when it has done that.
        """
        self.theirs.close()
        with self._ending:
            self._closing = True
            if self._serves:
                os.eventfd_write(self._wake.fileno(), 1)
            else:
                self._give_back()
        if wait and self._thread.ident is not None:
            self._thread.join()

    def _give_back(self) -> None:
        self._transport.close()
        self._wake.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._transport.fileno(), select.POLLIN)
        poll.register(self._wake.fileno(), select.POLLIN)
        try:
            while not any(fd == self._wake.fileno() for fd, _ in poll.poll()):
                self._receive()
                if self._connection.closed:
                    log.debug("the back-end closed its channel")
                    return
        except (RemoteProtocolError, PeerGone, OSError) as error:
            log.warning("the back-end channel is closed: %s", error)
        finally:
            self._connection.close()
            self._close_refused()
            self._transport.shutdown()  # not closed as long as bytes may be unread: that would be a reset
            with self._ending:
                self._serves = False
                if self._closing:
                    self._give_back()

    def _receive(self) -> None:
        self._connection.receive(*self._transport.receive(self._connection.want))
        while True:
            try:
                event = self._connection.next_event()
            finally:
                self._close_refused()
            match event:
                case Message():
                    self._serve(event)
                case Refused(request, _, reason):
                    log.warning("%s from the back-end is refused: %s", name_of(request), reason)
                    self._answer(event, 1)
                case _:
                    return

    def _serve(self, message: Message[Fd]) -> None:
        log.debug("from the back-end: %s", describe(message))
        for fd in message.fds:
            fd.close()
        match message:
            case Message(BackendRequest.CONFIG_CHANGE_MSG):
                self._answer(message, 0)
                self._safely(self._config_changed)
            case Message(BackendRequest.IOTLB_MSG, Iotlb(type=IotlbType.MISS) as miss):
                known = False
                try:
                    known = self._translate(miss)
                except VhostUserError as error:
                    log.warning("a translation could not be sent: %s", error)
                self._answer(message, 0 if known else 1)
            case _:
                log.warning("the back-end asked for what is not done here: %s", describe(message))
                self._answer(message, 1)

    def _answer(self, event: Message[Fd] | Refused, code: int) -> None:
        try:
            ack = self._connection.acknowledge(event, code)
        except LocalProtocolError as error:
            raise RemoteProtocolError(f"{name_of(event.request)} cannot be answered: {error}") from error
        if ack is not None:
            self._transport.send(*ack)

    def _safely(self, act: Callable[[], None]) -> None:
        """A user's callback, or a back-end that refuses, must not end the channel."""
        try:
            act()
        except VhostUserError as error:
            log.warning("the changed configuration could not be read: %s", error)
        except Exception:
            log.exception("an error in what was to hear of a changed configuration")

    def _close_refused(self) -> None:
        for fd in self._connection.refused_fds():
            fd.close()
