"""Asking a running disk through its control socket. Touches: that socket."""

from __future__ import annotations

import os

import click

from vhostuser.cli import CONTROL_SUFFIX
from vhostuser.control import ControlClient
from vhostuser.errors import OperatorError, UsageError
from vhostuser.jsonrpc import INVALID_PARAMS, ControlError

control_option = click.option(
    "--control", metavar="PATH", show_default="SOCKET.ctl", help="The control socket, when it was chosen for serving."
)
"""For every command that asks."""

request_option = click.option(
    "--request",
    multiple=True,
    metavar="QUEUE:HEAD",
    help="Only this one, as stats --inflight names it; may be repeated.",
)
"""For commands that decide about requests."""


def control_path(socket: str, control: str | None) -> str:
    """Where the control socket of the disk served on ``socket`` is."""
    return control if control is not None else socket + CONTROL_SUFFIX


def connect(socket: str, control: str | None) -> ControlClient:
    """A connection to the disk served on ``socket``, to be closed by the caller. Raises `OperatorError`."""
    path = control_path(socket, control)
    if control is None and not os.path.lexists(path) and os.path.lexists(socket):
        raise OperatorError(
            socket, "it has no control socket beside it", "Name the one it was served with: --control PATH"
        )
    return ControlClient(path)


def ask(client: ControlClient, method: str, **params: object) -> dict[str, object]:
    """The result of one call. Raises `OperatorError` with what the other side says is wrong."""
    try:
        result = client.call(method, **params)
    except ControlError as error:
        match error.data:
            case {"subject": str(subject), "cause": str(cause), "advice": str(advice)}:
                kind = UsageError if error.code == INVALID_PARAMS else OperatorError
                raise kind(subject, cause, advice) from error
            case _:
                raise OperatorError(method, str(error).rstrip("."), "See the log of the program that serves") from error
    if not isinstance(result, dict):
        raise OperatorError(method, "the answer makes no sense", "See whether both programs have the same version")
    return result


def number(answer: dict[str, object], key: str) -> int:
    """A number of an answer. Raises `OperatorError` when it is none."""
    value = answer.get(key)
    if not isinstance(value, int):
        raise OperatorError(key, "the answer makes no sense", "See whether both programs have the same version")
    return value


def decide(socket: str, control: str | None, method: str, requests: tuple[str, ...]) -> int:
    """Have ``method`` carried out for ``requests``, or for all; returns for how many it was. Raises `OperatorError`."""
    with connect(socket, control) as client:
        return number(ask(client, method, **({"requests": list(requests)} if requests else {})), "requests")
