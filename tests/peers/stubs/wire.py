"""Messages as bytes: a header of three words, a payload, descriptors. Touches one socket."""

from __future__ import annotations

import array
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

HEADER: Final = struct.Struct("=III")
VERSION: Final = 1
REPLY: Final = 4
NEED_REPLY: Final = 8
MAX_FDS: Final = 32


class Closed(Exception):  # noqa: N818 - an event, not a fault
    """The front-end closed the connection."""


@dataclass(frozen=True, slots=True)
class Request:
    """One message as it came."""

    number: int
    flags: int
    payload: bytes
    fds: tuple[int, ...]

    @property
    def need_reply(self) -> bool:
        """Whether it asks for an acknowledgement."""
        return bool(self.flags & NEED_REPLY)


def receive(connection: socket.socket) -> Request:
    """The next message; blocks for the rest of one that has begun. Raises `Closed`."""
    space = socket.CMSG_SPACE(MAX_FDS * 4)
    head, control, flags, _ = connection.recvmsg(HEADER.size, space)
    numbers = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % 4])
    if not head:
        raise Closed
    assert not flags & socket.MSG_CTRUNC
    number, message_flags, size = HEADER.unpack(head + _exactly(connection, HEADER.size - len(head)))
    return Request(number, message_flags, _exactly(connection, size), tuple(numbers))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise Closed
        data += more
    return data


def reply(number: int, payload: bytes) -> bytes:
    """The bytes of an answer to request ``number``."""
    return HEADER.pack(number, VERSION | REPLY, len(payload)) + payload


def close_all(fds: tuple[int, ...]) -> None:
    """Close descriptors that are not wanted."""
    for fd in fds:
        os.close(fd)
