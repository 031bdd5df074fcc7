"""A running server gives its sockets to a successor; `succession` is the other side. Touches sockets and the server.

The successor asks for it with two calls on one connection. ``server.handover`` has the server come to rest and sends
what it listens on; ``server.leave`` has it end. Between them the server waits: when the successor goes away or takes
too long, it serves on as if nothing had happened. So there is never more than one of them that takes requests, and
never none that could. Front-ends that connect meanwhile queue on the one listening socket that both have.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from vhostuser.errors import DrainTimeout, OperatorError
from vhostuser.jsonrpc import INVALID_PARAMS, ControlError, Method, Offer, Params, only

if TYPE_CHECKING:
    from vhostuser.backend import Server
    from vhostuser.transport import Listener

PATIENCE_S: Final = 5.0
"""How long a successor may take between its two calls: it has nothing to do there but to look at what it got."""
MAX_TIMEOUT_S: Final = 600.0
DEFAULT_TIMEOUT_S: Final = 10.0
"""How long storage may take to come to rest when the successor does not say."""

log = logging.getLogger(__name__)


class Handover:
    """What a successor may ask: `methods` for the control socket."""

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
        timeout_s = params.get("timeout_s", DEFAULT_TIMEOUT_S)
        if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 0 <= timeout_s <= MAX_TIMEOUT_S:
            raise ControlError(INVALID_PARAMS, f"timeout_s is a number of seconds up to {MAX_TIMEOUT_S:.0f}")
        with self._lock:
            if self._offered:
                raise OperatorError(self._name, "it is being handed over already", "Wait for the other successor")
            self._offered = True
        try:
            log.info("%s: a successor asks for the socket", self._name)
            self._server.rest(timeout_s)
            sockets = [{"name": name, "file": listener.identity} for name, listener in self._listeners.items()]
            fds = [listener.duplicate() for listener in self._listeners.values()]
        except DrainTimeout as error:
            self._offered = False
            log.warning("%s: no hand-over, serving on: %s", self._name, error)
            advice = "Try again when its storage answers; SIGTERM ends it in any case"
            raise OperatorError(self._name, f"the running server keeps it: {error}", advice) from error
        except BaseException:
            self._over()
            raise
        return Offer({"sockets": sockets}, fds, PATIENCE_S, self._over)

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
