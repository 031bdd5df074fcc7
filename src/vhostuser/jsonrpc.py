"""JSON-RPC 2.0: from a line to the call it means, and back. Touches nothing but the methods that are called.

One object, or one batch, per line. What is invalid, and how that is told, is the specification's. By hand and with the
standard library, for a server that starts has no time to load more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vhostuser.errors import OperatorError, RemoteProtocolError, UsageError, VhostUserError

if TYPE_CHECKING:
    from vhostuser.fds import Fd

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
FAILED: Final = -32000
"""What was asked for makes sense and could not be done; ``data`` has the subject, cause and advice."""

MAX_BATCH: Final = 64

Params = Mapping[str, object]
Method = Callable[[Params], object]
"""Returns what is the result, or an `Offer`."""

Key = int | float | str | None
"""What a call is known by; that of a notification is `NO_KEY`."""
NO_KEY: Final = object()

log = logging.getLogger(__name__)


class ControlError(VhostUserError):
    """A call that the other side answered with an error, or a parameter that a method cannot take."""

    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(message)
        self.code = code
        self.data = data


@dataclass(frozen=True, slots=True)
class Offer:
    """A result with descriptors for a client that has to answer: by another call on the same connection, in time."""

    result: object
    fds: Sequence[Fd]
    """Closed once they are sent."""
    patience_s: float
    """How long the client's next call may take; later, it is disconnected."""
    over: Callable[[], None]
    """Called when the connection has ended, however it ended."""


def only(params: Params, *names: str) -> None:
    """Raise `ControlError` when there are parameters other than ``names``."""
    surplus = sorted(set(params) - set(names))
    if surplus:
        raise ControlError(INVALID_PARAMS, f"there is no parameter {surplus[0]!r}")


def answer(line: bytes, methods: Mapping[str, Method], offers: list[Offer]) -> bytes | None:
    """The line that answers ``line``, without its end; None when only notifications were in it.

    What is offered with it is added to ``offers``.
    """
    try:
        raw = _decode(line)
    except ValueError as error:
        return refusal(ControlError(PARSE_ERROR, f"this is not JSON: {error}"))
    if not isinstance(raw, list):
        reply = _answer_one(raw, methods, offers)
        return None if reply is None else _encode(reply)
    if not 1 <= len(raw) <= MAX_BATCH:
        return refusal(ControlError(INVALID_REQUEST, f"a batch has 1 to {MAX_BATCH} requests, not {len(raw)}"))
    replies = [reply for one in raw if (reply := _answer_one(one, methods, offers)) is not None]
    return _encode(replies) if replies else None


def refusal(error: ControlError) -> bytes:
    """The line that answers what was no request."""
    return _encode(_failure(None, error))


def request(number: int, method: str, params: Mapping[str, object]) -> bytes:
    """The line for one call."""
    return _encode({"jsonrpc": "2.0", "id": number, "method": method, "params": params})


def result(line: bytes, number: int) -> object:
    """The result of call ``number``, which ``line`` answers. Raises `ControlError` and `RemoteProtocolError`."""
    try:
        reply = _decode(line)
    except ValueError as error:
        raise RemoteProtocolError(f"the answer is not JSON-RPC: {error}") from error
    match reply:
        case {"jsonrpc": "2.0", "error": {"code": int(code), "message": str(message), **rest}}:
            raise ControlError(code, message, rest.get("data"))
        case {"jsonrpc": "2.0", "id": key, "result": found}:
            if key != number:
                raise RemoteProtocolError(f"call {number} was answered as {key!r}")
            return found
    raise RemoteProtocolError("the answer is not JSON-RPC: it has neither result nor error")


def _answer_one(raw: object, methods: Mapping[str, Method], offers: list[Offer]) -> dict[str, object] | None:
    key = raw.get("id", NO_KEY) if isinstance(raw, dict) else None
    notification = key is NO_KEY
    if not _is_key(key):
        key = None
    try:
        name, params = _understood(raw)
    except ControlError as error:
        return _failure(key, error)
    try:
        found = _call(name, params, methods)
    except ControlError as error:
        return None if notification else _failure(key, error)
    if isinstance(found, Offer):
        offers.append(found)
        found = found.result
    return None if notification else {"jsonrpc": "2.0", "id": key, "result": found}


def _understood(raw: object) -> tuple[str, object]:
    """The method and the parameters of one request. Raises `ControlError` for what is none."""
    match raw:
        case {"jsonrpc": "2.0", "method": str(name), **rest}:
            params = rest.get("params", {})
            if isinstance(params, dict | list) and _is_key(rest.get("id")):
                return name, params
    raise ControlError(INVALID_REQUEST, "this is no request: it has a jsonrpc of 2.0, a method, maybe params and an id")


def _is_key(key: object) -> bool:
    return key is None or (isinstance(key, int | float | str) and not isinstance(key, bool))


def _call(name: str, params: object, methods: Mapping[str, Method]) -> object:
    method = methods.get(name)
    if method is None:
        raise ControlError(METHOD_NOT_FOUND, f"there is no method {name!r}")
    if not isinstance(params, dict):
        raise ControlError(INVALID_PARAMS, "parameters have names here: give an object")
    try:
        return method(params)
    except ControlError:
        raise
    except OperatorError as error:
        code = INVALID_PARAMS if isinstance(error, UsageError) else FAILED
        parts = {"subject": error.subject, "cause": error.cause, "advice": error.advice}
        raise ControlError(code, str(error), parts) from error
    except (VhostUserError, OSError) as error:
        raise ControlError(FAILED, str(error)) from error
    except Exception as error:
        log.exception("control socket: %s failed", name)
        raise ControlError(INTERNAL_ERROR, "an error of our own; the log has more") from error


def _failure(key: object, error: ControlError) -> dict[str, object]:
    body: dict[str, object] = {"code": error.code, "message": str(error)}
    if error.data is not None:
        body["data"] = error.data
    return {"jsonrpc": "2.0", "id": key, "error": body}


def _decode(line: bytes) -> object:
    """Raises `ValueError` for what is not JSON, such as bytes that are no text and numbers that are none."""
    try:
        found: object = json.loads(line.decode(), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is no number")


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(errors="replace")
