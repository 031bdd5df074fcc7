"""What travels on a connection: `Message`, `Reply` and `Refused`. Touches nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vhostuser.protocol.ids import BackendRequest, FrontendRequest
from vhostuser.protocol.layout import Payload
from vhostuser.protocol.payloads import Nothing

F_co = TypeVar("F_co", covariant=True)


def identify(request: int, *, nested: bool) -> int:
    """Return ``request`` as a member of its enumeration where there is one; ``nested`` says which channel's."""
    try:
        return BackendRequest(request) if nested else FrontendRequest(request)
    except ValueError:
        return request


def name_of(request: int) -> str:
    """Return the name of a request as the specification has it, or its number."""
    match request:
        case FrontendRequest(name=name):
            return name
        case BackendRequest(name=name):
            return f"BACKEND_{name}"
    return f"message {request}"


@dataclass(frozen=True)  # no slots: with them Python 3.11 cannot build a ``Message[Fd](...)``
class Message(Generic[F_co]):
    """A request, with the descriptors attached to it; who receives it takes them over."""

    request: int  # FrontendRequest or BackendRequest; a plain integer when it is in neither
    payload: Payload = field(default_factory=Nothing)
    fds: tuple[F_co, ...] = ()
    need_reply: bool = False


@dataclass(frozen=True)
class Reply(Generic[F_co]):
    """The answer to a request that we sent: its own reply, or the acknowledgement it asked for."""

    request: int
    payload: Payload
    fds: tuple[F_co, ...] = ()
    ack: bool = False  # True: payload is U64, 0 for success


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that breaks a rule. Its descriptors are among `Connection.refused_fds`.

    `Connection.acknowledge` says whether the peer can be told; where it cannot, the connection has to end.
    """

    request: int
    size: int  # of the payload, in bytes
    reason: str
    need_reply: bool = False
