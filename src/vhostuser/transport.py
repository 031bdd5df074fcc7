"""Bytes and descriptors over a Unix stream socket. Touches sockets and, to listen, the socket's file.

Every socket made here is blocking and close-on-exec; `O_NONBLOCK` of an inherited one is left as it is, since the open
file may be shared with others.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from vhostuser import socketpath
from vhostuser.errors import LocalProtocolError, OperatorError, PeerGone, RemoteProtocolError, SetupError, UsageError
from vhostuser.fds import Fd
from vhostuser.protocol.ids import MAX_FDS

SEND_TIMEOUT_S: Final = 30.0
"""How long a peer may leave its end unread before it counts as gone."""

PIPE_CHUNK: Final = 4096
"""What a pipe that polls writable takes at once without blocking (pipe(7), PIPE_BUF)."""


class Transport:
    """One end of a connected stream socket. Blocks; safe for one reading and one writing thread."""

    def __init__(self, sock: socket.socket, *, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Takes over ``sock``, a connected AF_UNIX stream socket."""
        self._socket = sock
        self._send_timeout_s = send_timeout_s

    @staticmethod
    def over(fd: Fd, *, send_timeout_s: float = SEND_TIMEOUT_S) -> Transport:
        """Return a transport over what came with SET_BACKEND_REQ_FD: a socket, or the write end of a pipe (UML).

        Takes over ``fd``. Raises `SetupError`, and leaves it with the caller, when it is neither.
        """
        kind = os.fstat(fd.fileno()).st_mode
        if stat.S_ISFIFO(kind):
            return Transport.over_pipe(fd, send_timeout_s=send_timeout_s)
        if not stat.S_ISSOCK(kind):
            raise SetupError("the back-end channel is neither a socket nor a pipe")
        return Transport(socket.socket(fileno=fd.detach()), send_timeout_s=send_timeout_s)

    @staticmethod
    def over_pipe(fd: Fd, *, send_timeout_s: float = SEND_TIMEOUT_S) -> Transport:
        """Return a transport that only sends. Takes over ``fd``, the write end of a pipe."""
        return _PipeTransport(fd, send_timeout_s=send_timeout_s)

    @staticmethod
    def pair(*, send_timeout_s: float = SEND_TIMEOUT_S) -> tuple[Transport, Fd]:
        """Return one end of a new socket pair, and the other as a descriptor to give away."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return Transport(ours, send_timeout_s=send_timeout_s), Fd(theirs.detach())

    @property
    def receives(self) -> bool:
        """False for a pipe: no acknowledgement can ever come back."""
        return True

    @property
    def place(self) -> str:
        """Where the listener was that accepted this connection, as a person writes it; empty when it has no name."""
        return socketpath.written(self._socket.getsockname())

    def fileno(self) -> int:
        """Return the descriptor, to wait on; -1 once closed."""
        return self._socket.fileno()

    def peer_hung_up(self) -> bool:
        """Whether the peer has closed its end, even if there is something left to receive. Does not wait."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def receive(self, want: int, *, wait: bool = True) -> tuple[bytes, list[Fd]]:
        """Return 1 to ``want`` bytes and the descriptors that came with them; no bytes when the peer closed its end.

        Blocks until there is something, or raises `BlockingIOError` when it is not to ``wait``. Raises
        `RemoteProtocolError` when descriptors were cut off; those that came are closed then.
        """
        how = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
        space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
        while True:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(want, space, how)
                break
            except BlockingIOError:
                if not wait:
                    raise
                self._wait(select.POLLIN, None)
            except ConnectionResetError:  # it closed its end with our bytes unread
                return b"", []
        fds = _descriptors(ancillary)
        if flags & socket.MSG_CTRUNC:
            for fd in fds:
                fd.close()
            raise RemoteProtocolError(
                f"descriptors were cut off: more than {MAX_FDS} were sent, or this process may not open that many"
            )
        return data, fds

    def send(self, data: bytes, fds: Sequence[Fd] = ()) -> None:
        """Send all of ``data``, with ``fds`` attached to its first byte; they stay owned by the caller.

        Raises `PeerGone` when the peer closed its end, or does not take it all within the time limit of this
        transport; what it got until then is unknown, so the connection is over.
        """
        deadline = time.monotonic() + self._send_timeout_s
        rest = memoryview(data)
        while rest:
            try:
                sent = self.send_some(rest, fds)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
                continue
            rest, fds = rest[sent:], ()

    def send_some(self, data: bytes | memoryview, fds: Sequence[Fd] = ()) -> int:
        """Send what can be sent without waiting, and return how many bytes that were: at least one.

        Raises `BlockingIOError` when the peer takes nothing now, and `PeerGone` when it closed its end.
        """
        try:
            return self._write(data, fds)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PeerGone("the peer closed the connection") from error

    def _write(self, data: bytes | memoryview, fds: Sequence[Fd]) -> int:
        numbers = array.array("i", [fd.fileno() for fd in fds])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if fds else []
        return self._socket.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _wait(self, event: int, deadline: float | None) -> None:
        """Wait until the descriptor is ready for ``event``, or for what is an error of the next call."""
        poll = select.poll()
        poll.register(self.fileno(), event)
        timeout_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(timeout_ms):
            raise PeerGone(f"the peer did not read a message within {self._send_timeout_s:g} s")

    def shutdown(self) -> None:
        """End both directions: the peer, and a thread of ours that is in `receive`, see the end of the stream."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise

    def close(self) -> None:
        """Close this end; does nothing the second time."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _PipeTransport(Transport):
    """The write end of a pipe."""

    def __init__(self, fd: Fd, *, send_timeout_s: float) -> None:
        self._pipe = fd
        self._send_timeout_s = send_timeout_s

    @property
    def receives(self) -> bool:
        return False

    def fileno(self) -> int:
        return -1 if self._pipe.closed else self._pipe.fileno()

    def receive(self, want: int, *, wait: bool = True) -> tuple[bytes, list[Fd]]:
        raise LocalProtocolError("nothing can be received through the write end of a pipe")

    def _write(self, data: bytes | memoryview, fds: Sequence[Fd]) -> int:
        if fds:
            raise LocalProtocolError("no descriptor can be sent through a pipe")
        poll = select.poll()
        poll.register(self._pipe.fileno(), select.POLLOUT)
        if not poll.poll(0):  # the pipe may be a blocking one, and it is not ours to change
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._pipe.fileno(), data[:PIPE_CHUNK])

    def shutdown(self) -> None:
        self.close()

    def close(self) -> None:
        self._pipe.close()


class Listener:
    """A listening socket, and the file that it made, if it made one."""

    def __init__(self, sock: socket.socket, path: str | None = None, identity: tuple[int, int] | None = None) -> None:
        """Takes over ``sock``; ``identity`` is device and inode of the file at ``path`` if that is ours to remove."""
        self._socket = sock
        self.path = path
        self._identity = identity

    @property
    def place(self) -> str:
        """Where it listens, as a person writes it: absolute, or an abstract name with its ``@``."""
        return socketpath.written(self.path or self._socket.getsockname())

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the file that goes when this is closed; None when none does."""
        return self._identity

    def remove_file(self) -> None:
        """Remove the socket's file if it still is the one made here, and go on listening. Idempotent."""
        identity, self._identity = self._identity, None
        if self.path is not None and identity is not None and socketpath.identity(self.path) == identity:
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def take_file(self, path: str, identity: tuple[int, int] | None) -> None:
        """Listen at ``path`` in our turn, and remove the file with that ``identity`` in the end, if any."""
        self.path, self._identity = path, identity

    def leave_file(self) -> None:
        """Remove no file from now on: somebody else listens on the same socket and will do it."""
        self._identity = None

    def fileno(self) -> int:
        """Return the descriptor, to wait on; -1 once closed."""
        return self._socket.fileno()

    def duplicate(self) -> Fd:
        """Return a descriptor of the same listening socket, to give away."""
        return Fd(os.dup(self._socket.fileno()))

    def accept(self, *, send_timeout_s: float = SEND_TIMEOUT_S) -> Transport:
        """Return the next connection; blocks until there is one. Raises `OSError` when none can be opened."""
        while True:
            try:
                connected, _ = self._socket.accept()
            except BlockingIOError:
                select.select([self._socket], [], [])
                continue
            return Transport(connected, send_timeout_s=send_timeout_s)

    def close(self) -> None:
        """Stop listening, and remove the socket's file if it still is the one made here. Idempotent."""
        self.remove_file()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def connect(path: str, timeout_s: float = 10.0, *, send_timeout_s: float = SEND_TIMEOUT_S) -> Transport:
    """Connect to the socket at ``path``; ``@name`` is an abstract one.

    Blocks while the listener's queue is full, at most ``timeout_s`` (`PeerGone`). Raises `OperatorError` when nobody
    listens there.
    """
    address = socketpath.address(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _limit_connect(sock, timeout_s)
        while not _connected(sock, address):
            pass
        _limit_connect(sock, 0)
    except BlockingIOError as error:
        sock.close()
        raise PeerGone(f"{path} did not accept a connection within {timeout_s:g} s") from error
    except OSError as error:
        sock.close()
        raise OperatorError(path, *socketpath.connect_advice(error)) from error
    return Transport(sock, send_timeout_s=send_timeout_s)


def _connected(sock: socket.socket, address: str) -> bool:
    """Connect, and say whether that was not interrupted: `connect` takes EINTR for success on the way, which no Unix
    socket has. A thread that closed an io_uring is interrupted so without any signal."""
    sock.connect(address)
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return False
    return True


def _limit_connect(sock: socket.socket, timeout_s: float) -> None:
    """Set how long the kernel waits for room in the listener's queue; 0 for ever. `settimeout` does not reach that."""
    whole = int(timeout_s)
    value = struct.pack("@ll", whole, int((timeout_s - whole) * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def listen(path: str, mode: int = 0o600, group: str | int | None = None, backlog: int = 8) -> Listener:
    """Listen on ``path``; ``@name`` is an abstract one, which has neither ``mode`` nor ``group``.

    The file is made under a temporary name, with its final mode and group, and then takes the place of a stale socket
    in one step. Raises `OperatorError` when somebody listens there already or the file cannot be made.
    """
    address = socketpath.address(path)
    gid = socketpath.gid(group)
    if path.startswith("@"):
        return _listen_abstract(path, address, backlog)
    socketpath.refuse_occupied(path)
    temporary = os.path.join(os.path.dirname(path), f".{os.urandom(4).hex()}.socket")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), mode & 0o600)  # Linux makes the file with the mode of the socket
        socketpath.bind(sock, temporary)
        try:
            if gid is not None:
                os.chown(temporary, -1, gid)
            os.chmod(temporary, mode)
            sock.listen(backlog)
            identity = socketpath.identity(temporary)
            os.rename(temporary, path)
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        sock.close()
        cause = f"the socket cannot be made: {os.strerror(error.errno or 0)}"
        raise OperatorError(path, cause, "Choose a directory, mode and group that this user may use") from error
    return Listener(sock, path, identity)


def _listen_abstract(path: str, address: str, backlog: int) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(address)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        taken = error.errno == errno.EADDRINUSE
        cause = "another program listens on it" if taken else os.strerror(error.errno or 0)
        raise OperatorError(path, cause, "Stop that program, or choose another name") from error
    return Listener(sock, path)


def adopt(fd: int | Fd, *, send_timeout_s: float = SEND_TIMEOUT_S) -> Listener | Transport:
    """Take over an inherited socket: a `Listener` if it listens, a `Transport` if it is connected.

    Raises `UsageError` for anything else, and leaves the descriptor with the caller then.
    """
    number = fd if isinstance(fd, int) else fd.fileno()
    subject = f"file descriptor {number}"
    try:
        with Fd(os.dup(number)) as copy, socket.socket(fileno=copy.fileno()) as probe:
            copy.detach()  # probe closes it
            if probe.family != socket.AF_UNIX or probe.type != socket.SOCK_STREAM:
                raise UsageError(subject, "it is not a Unix stream socket", "Pass an AF_UNIX socket of SOCK_STREAM")
            listens = bool(probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            if not listens:
                probe.getpeername()
    except OSError as error:
        raise UsageError(subject, *_adopt_advice(error)) from error
    os.set_inheritable(number, False)
    sock = socket.socket(fileno=number if isinstance(fd, int) else fd.detach())
    return Listener(sock) if listens else Transport(sock, send_timeout_s=send_timeout_s)


def _adopt_advice(error: OSError) -> tuple[str, str]:
    match error.errno:
        case errno.EBADF:
            return "it is not open", "Pass the number of a socket that this program inherits"
        case errno.ENOTSOCK:
            return "it is not a socket", "Pass an AF_UNIX socket of SOCK_STREAM"
        case errno.ENOTCONN:
            return "it neither listens nor is connected", "Call listen() or connect() on it first"
    return os.strerror(error.errno or 0), "Pass an AF_UNIX socket of SOCK_STREAM"


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[Fd]:
    """Take over the descriptors in what recvmsg returned."""
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return [Fd(number) for number in numbers]
