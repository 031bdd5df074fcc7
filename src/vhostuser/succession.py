"""A successor takes the sockets of a running server over; `handover` is the other side. Touches the control socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from vhostuser import socketpath
from vhostuser.control import ControlClient
from vhostuser.errors import OperatorError, PeerGone, UsageError
from vhostuser.jsonrpc import METHOD_NOT_FOUND, ControlError
from vhostuser.transport import Listener, adopt

if TYPE_CHECKING:
    from vhostuser.blk import BlockDevice
    from vhostuser.fds import Fd

ANSWER_S: Final = 10.0
"""How long the running server may take beyond the time it was given to come to rest."""


class Socket(msgspec.Struct):
    """One of the sockets that are handed over."""

    name: str
    """ "disk" or "control"."""
    file: tuple[int, int] | None
    """Device and inode of the file that was made with it and has to be removed with it."""


class Sockets(msgspec.Struct):
    """The answer to ``server.handover``: as many descriptors come with it, in this order."""

    sockets: list[Socket]


class Predecessor:
    """A running server, reached over its control socket."""

    def __init__(self, control: str, *, timeout_s: float) -> None:
        """Connect. ``timeout_s``: how long the server may take to come to rest. Raises `OperatorError`."""
        self._control = control
        self._timeout_s = timeout_s
        try:
            self._client = ControlClient(control, timeout_s=timeout_s + ANSWER_S)
        except OperatorError as error:
            raise OperatorError(
                control, f"no server to take over from: {error.cause}", "Start without --upgrade, or correct --control"
            ) from error

    def check(self, device: BlockDevice, *, incoming: bool) -> None:
        """Raise `UsageError` unless a guest of the running server can go on with ``device`` without noticing.

        ``incoming``: ``device`` will wait for its image, which it must if the running server has not got it.
        """
        running = self._client.call("disk.info")
        if not isinstance(running, Mapping):
            raise OperatorError(self._control, "the answer makes no sense", "Stop that server, then start this one")
        mine = device.info()
        for key, name in (("size", "size"), ("block_size", "block size"), ("read_only", "read-only")):
            if running.get(key) != mine[key]:
                self._misfit(f"its {name} is {running.get(key)}, here it would be {mine[key]}")
        if not isinstance(queues := running.get("num_queues"), int) or queues > device.num_queues:
            self._misfit(f"it has {queues} queues, here it would be {device.num_queues}")
        if running.get("image", "held") != "held" and not incoming:
            cause = f"the image of the running server is {running['image']}: another one has it, or may get it"
            raise UsageError(self._control, cause, "Upgrade with --incoming, too, or stop that one first")
        offered, acked = mine["features_offered"], running.get("features_acked") or []
        lost = [name for name in acked if name not in offered] if isinstance(offered, list) else []
        if lost:
            self._misfit(f"its guest uses {', '.join(lost)}, which would be gone")

    def _misfit(self, cause: str) -> None:
        advice = "Upgrade with the options of the running server, or stop that one first"
        raise UsageError(self._control, f"the running server differs: {cause}", advice)

    def take_over(self, socket: str | None) -> tuple[Listener, Listener]:
        """Have the server come to rest and end, and return what it listened on: the disk's and the control socket.

        ``socket``: where the disk's is expected, if that is known. Blocks until the server is about to end; it still
        holds the image for a moment. Raises `OperatorError`, and the server serves on then.
        """
        told = self._ask()
        fds = self._client.take_fds()
        listeners = {one.name: _adopted(fd) for one, fd in zip(told.sockets, fds, strict=False)}
        files = {one.name: one.file for one in told.sockets}
        paths = {"disk": socket, "control": self._control}
        try:
            if len(fds) != len(told.sockets) or set(listeners) != set(paths):
                raise OperatorError(self._control, "the running server sent other sockets", "Stop it, then start this")
            for name, listener in listeners.items():
                _check_place(listener, paths[name], files[name])
            self._leave()
        except BaseException:
            for listener in listeners.values():
                listener.close()
            raise
        for name, listener in listeners.items():
            if (path := paths[name]) is not None:
                listener.take_file(path, files[name])
        return listeners["disk"], listeners["control"]

    def _ask(self) -> Sockets:
        try:
            answer = self._client.call("server.handover", timeout_s=self._timeout_s)
            return msgspec.convert(answer, Sockets)
        except ControlError as error:
            match error.data:
                case {"subject": str(subject), "cause": str(cause), "advice": str(advice)}:
                    raise OperatorError(subject, cause, advice) from error
            cause = "it cannot hand over" if error.code == METHOD_NOT_FOUND else str(error)
            raise OperatorError(self._control, cause, "Stop the running server, then start this one") from error
        except msgspec.ValidationError as error:
            raise OperatorError(self._control, f"the answer makes no sense: {error}", "Stop that server") from error

    def _leave(self) -> None:
        try:
            self._client.call("server.leave")
        except PeerGone:
            return  # it was quick
        except ControlError as error:
            raise OperatorError(self._control, str(error), "Try again") from error

    def close(self) -> None:
        """Disconnect. Idempotent."""
        self._client.close()


def _check_place(listener: Listener, path: str | None, file: tuple[int, int] | None) -> None:
    """Raise `UsageError` unless ``path``, if there is one, is where ``listener`` listens; ``file`` is its own there."""
    if path is None and file is not None:
        raise UsageError("--upgrade", "the running server made the socket it listens on", "Name that one with --socket")
    if path is None:
        return
    there = socketpath.identity(path) == file if file is not None else socketpath.written(path) == listener.place
    if not there:
        raise UsageError(path, "the running server listens on another socket", "Name that one with --socket")


def _adopted(fd: Fd) -> Listener:
    with fd:
        endpoint = adopt(fd)
    if isinstance(endpoint, Listener):
        return endpoint
    endpoint.close()
    raise OperatorError("hand-over", "one of the sockets does not listen", "Stop the running server")
