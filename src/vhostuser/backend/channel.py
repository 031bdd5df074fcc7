"""The back-end channel: our own requests to the front-end. Touches the one descriptor it was given.

It never waits: what the peer does not read stays here, and at most two messages are kept, since one that says "the
configuration changed" also speaks for all later changes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vhostuser.errors import PeerGone
from vhostuser.protocol import BackendRequest, Connection, Message, Role
from vhostuser.transport import Transport

if TYPE_CHECKING:
    from vhostuser.fds import Fd


class Channel:
    """What came with SET_BACKEND_REQ_FD: a socket (QEMU), or the write end of a pipe (UML).

    No request of ours asks for an acknowledgement: QEMU sends GET_CONFIG before it would acknowledge
    CONFIG_CHANGE_MSG, and a session that waited could not answer. Used from the session thread.
    """

    def __init__(self, fd: Fd, main: Connection[Fd]) -> None:
        """Takes ``fd``; ``main`` is the connection it came over, whose negotiation holds here, too.

        Raises `SetupError` when ``fd`` is neither a socket nor a pipe.
        """
        self._transport = Transport.over(fd)
        self._connection: Connection[Fd] = Connection(Role.BACKEND, nested=True, main=main)
        self._pending = b""

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._transport.fileno()

    @property
    def waiting(self) -> bool:
        """Whether something could not be written yet: watch for writability and call `step`."""
        return bool(self._pending)

    @property
    def readable(self) -> bool:
        """Whether the peer can say anything here: a pipe goes one way."""
        return self._transport.receives

    def config_changed(self) -> None:
        """Send CONFIG_CHANGE_MSG, or keep it until the peer reads. Raises `PeerGone` when there is no peer any more."""
        message, _ = self._connection.send(Message(BackendRequest.CONFIG_CHANGE_MSG))
        if len(self._pending) < len(message):
            self._pending += message
        self.flush()

    def flush(self) -> None:
        """Write what is kept, as far as the peer lets us. Raises `PeerGone`."""
        try:
            while self._pending:
                self._pending = self._pending[self._transport.send_some(self._pending) :]
        except BlockingIOError:
            return
        except PeerGone:
            raise
        except OSError as error:
            raise PeerGone(f"the back-end channel cannot be written: {os.strerror(error.errno or 0)}") from error

    def receive(self) -> None:
        """Look at what the peer wrote.

        Raises `PeerGone` when it closed the channel, `RemoteProtocolError` for any message: nothing was asked of it.
        """
        try:
            data, fds = self._transport.receive(self._connection.want, wait=False)
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerGone(f"the back-end channel cannot be read: {os.strerror(error.errno or 0)}") from error
        if not data:
            raise PeerGone("the front-end closed the back-end channel")
        self._connection.receive(data, fds)
        try:
            self._connection.next_event()
        finally:
            for fd in self._connection.refused_fds():
                fd.close()

    def step(self) -> None:
        """Do whatever the descriptor is ready for. Raises as `receive` and `flush` do."""
        if self._transport.receives:
            self.receive()
        self.flush()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        self._transport.close()
