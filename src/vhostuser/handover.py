"""A running server gives its sockets to a successor. Touches the control socket and the server.

The successor asks for it with two calls on one connection. ``server.handover`` has the server come to rest and sends
what it listens on; ``server.leave`` has it end. Between them the server waits: when the successor goes away or takes
too long, it serves on as if nothing had happened. So there is never more than one of them that takes requests, and
never none that could. Front-ends that connect meanwhile queue on the one listening socket that both have.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from vhostuser import socketpath
from vhostuser.control import INVALID_PARAMS, METHOD_NOT_FOUND, ControlClient, ControlError, Method, Offer, Params, only
from vhostuser.errors import DrainTimeout, OperatorError, PeerGone, UsageError
from vhostuser.transport import Listener, adopt

if TYPE_CHECKING:
    from vhostuser.backend import Server
    from vhostuser.blk import BlockDevice
    from vhostuser.fds import Fd

PATIENCE_S: Final = 5.0
"""How long a successor may take between its two calls: it has nothing to do there but to look at what it got."""
MAX_TIMEOUT_S: Final = 600.0
ANSWER_S: Final = 10.0
"""How long the running server may take beyond the time it was given to come to rest."""

log = logging.getLogger(__name__)


class Socket(msgspec.Struct):
    """One of the sockets that are handed over."""

    name: str
    """ "disk" or "control"."""
    file: tuple[int, int] | None
    """Device and inode of the file that was made with it and has to be removed with it."""


class Sockets(msgspec.Struct):
    """The answer to ``server.handover``: as many descriptors come with it, in this order."""

    sockets: list[Socket]


class Handover:
    """The side of the running server: `methods` for its control socket."""

    def __init__(self, name: str, server: Server, disk: Listener, control: Listener) -> None:
        """``disk`` and ``control`` are what is given away; they stay the caller's. ``name``: of the disk."""
        self._name = name
        self._server = server
        self._listeners = {"disk": disk, "control": control}
        self._lock = threading.Lock()
        self._offered = False
        self._left = False

    def methods(self) -> dict[str, Method]:
        """The two calls."""
        return {"server.handover": self._offer, "server.leave": self._leave}

    def _offer(self, params: Params) -> Offer:
        only(params, "timeout_s")
        timeout_s = params.get("timeout_s", ANSWER_S)
        if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 0 <= timeout_s <= MAX_TIMEOUT_S:
            raise ControlError(INVALID_PARAMS, f"timeout_s is a number of seconds up to {MAX_TIMEOUT_S:.0f}")
        with self._lock:
            if self._offered:
                raise OperatorError(self._name, "it is being handed over already", "Wait for the other successor")
            self._offered = True
        try:
            log.info("%s: a successor asks for the socket", self._name)
            self._server.rest(timeout_s)
            sockets = [Socket(name, listener.identity) for name, listener in self._listeners.items()]
            fds = [listener.duplicate() for listener in self._listeners.values()]
        except DrainTimeout as error:
            self._offered = False
            log.warning("%s: no hand-over, serving on: %s", self._name, error)
            advice = "Try again when its storage answers; SIGTERM ends it in any case"
            raise OperatorError(self._name, f"the running server keeps it: {error}", advice) from error
        except BaseException:
            self._over()
            raise
        return Offer(msgspec.to_builtins(Sockets(sockets)), fds, PATIENCE_S, self._over)

    def _leave(self, params: Params) -> object:
        only(params)
        with self._lock:
            if not self._offered or self._left:
                raise ControlError(INVALID_PARAMS, "server.handover comes first")
            self._left = True
        log.info("%s: handed over to the successor", self._name)
        self._listeners["control"].leave_file()
        self._server.leave()
        return {}

    def _over(self) -> None:
        """The successor has gone; or this server has, which is as it should be."""
        with self._lock:
            if self._left or not self._offered:
                return
            self._offered = False
        log.warning("%s: the successor has gone without taking over: serving on", self._name)
        self._server.resume()


class Predecessor:
    """The side of the successor: a running server, reached over its control socket."""

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

    def check(self, device: BlockDevice) -> None:
        """Raise `UsageError` unless a guest of the running server can go on with ``device`` without noticing."""
        running = self._client.call("disk.info")
        if not isinstance(running, Mapping):
            raise OperatorError(self._control, "the answer makes no sense", "Stop that server, then start this one")
        mine = device.info()
        for key, name in (("size", "size"), ("block_size", "block size"), ("read_only", "read-only")):
            if running.get(key) != mine[key]:
                self._misfit(f"its {name} is {running.get(key)}, here it would be {mine[key]}")
        if not isinstance(queues := running.get("num_queues"), int) or queues > device.num_queues:
            self._misfit(f"it has {queues} queues, here it would be {device.num_queues}")
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
