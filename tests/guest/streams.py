"""The two connections to a QEMU: QMP, and the serial port that runs commands in the guest. Touches: two sockets.

The harness listens and QEMU connects, so that nothing has to be waited for in the file system.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from .processes import Child, ChildError, Deadline, readable

Json: TypeAlias = dict[str, object]
CHUNK: Final = 1 << 16
ANSWER_S: Final = 30.0
MARK: Final = b"\x1e"
REPEAT_S: Final = 20.0
"""How long an answer is waited for before the command is sent again."""


class CommandError(AssertionError):
    """A command in the guest, or a QMP command, failed."""


class RestartError(AssertionError):
    """The guest started anew where nobody had asked for it: a panic or a triple fault."""


class Listener:
    """A socket that a child is told to connect to, once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(1)

    def accept(self, child: Child, limit_s: float) -> Stream:
        """The child's connection; raises `ChildError` when it ends, or does not connect in time."""
        ready = readable([self._socket, child], Deadline(limit_s).left_s)
        if self._socket not in ready:
            how = "ended" if ready else "did not start in time"
            raise ChildError(f"{child.name} {how}: {child.tail()}")
        connection, _ = self._socket.accept()
        self.close()
        return Stream(connection, child)

    def close(self) -> None:
        """Stop listening and remove the socket's file."""
        self._socket.close()
        self.path.unlink(missing_ok=True)


class Stream:
    """A connection read up to a mark or by the byte."""

    def __init__(self, connection: socket.socket, child: Child) -> None:
        self._socket = connection
        self._child = child
        self._buffer = bytearray()

    def send(self, data: bytes) -> None:
        """Send everything; blocks while the other end is not reading."""
        self._socket.sendall(data)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def line(self, deadline: Deadline) -> bytes:
        """The next line without its end."""
        while (end := self._buffer.find(b"\n")) < 0:
            self._fill(deadline)
        return self._take(end + 1)[:-1]

    def has_line(self, limit_s: float) -> bool:
        """Whether a whole line is there or comes within ``limit_s``."""
        until = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            if not readable([self._socket], max(0.0, until - time.monotonic())):
                return False
            self._fill(Deadline(1.0))
        return True

    def exactly(self, size: int, deadline: Deadline) -> bytes:
        """The next ``size`` bytes."""
        while len(self._buffer) < size:
            self._fill(deadline)
        return self._take(size)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _fill(self, deadline: Deadline) -> None:
        if not readable([self._socket], deadline.left_s):
            raise TimeoutError(f"{self._child.name} does not answer; its output ends: {self._child.tail()}")
        try:
            data = self._socket.recv(CHUNK)
        except ConnectionResetError:
            data = b""
        if not data:
            raise ChildError(f"{self._child.name} ended; its output ends: {self._child.tail()}")
        self._buffer += data


class Qmp:
    """A QMP client: commands and their answers, events kept until somebody waits for them."""

    def __init__(self, stream: Stream) -> None:
        """``stream`` is taken over; the greeting is read and the capabilities negotiated."""
        self._stream = stream
        self._events: deque[Json] = deque()
        greeting = self._next(Deadline(ANSWER_S))
        if "QMP" not in greeting:
            raise ChildError(f"no QMP greeting but {greeting}")
        self.command("qmp_capabilities")

    def command(self, execute: str, **arguments: object) -> object:
        """Run a command and return its value; raises `CommandError`."""
        self._stream.send(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        deadline = Deadline(ANSWER_S)
        while True:
            message = self._next(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise CommandError(f"{execute}: {message['error']}")
            self._events.append(message)

    def wait(self, event: str, limit_s: float, **data: object) -> Json:
        """The next event of that name that carries ``data``; earlier ones that were not waited for count too."""
        deadline = Deadline(limit_s)
        for message in list(self._events):
            if _carries(message, event, data):
                self._events.remove(message)
                return message
        while True:
            message = self._next(deadline)
            if _carries(message, event, data):
                return message
            self._events.append(message)

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def _next(self, deadline: Deadline) -> Json:
        message = json.loads(self._stream.line(deadline))
        assert isinstance(message, dict)
        return message


def _carries(message: Json, event: str, data: Json) -> bool:
    carried = message.get("data", {})
    return message.get("event") == event and isinstance(carried, dict) and data.items() <= carried.items()


@dataclass(frozen=True, slots=True)
class Result:
    """What a command in the guest did."""

    status: int
    output: str


class Shell:
    """Runs commands in the guest through its second serial port (see ``init.sh`` for the framing)."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._number = 0
        self._boot = ""

    def wait_ready(self, limit_s: float) -> None:
        """Wait for a guest that starts to say that it takes commands; what came before is dropped."""
        deadline = Deadline(limit_s)
        while True:
            found = re.fullmatch(rb".*\x1eready (\S+)", self._stream.line(deadline), re.DOTALL)
            if found and found[1].decode() != self._boot:
                self._boot = found[1].decode()
                return

    def continues(self, other: Shell) -> None:
        """The guest that ``other`` ran commands in has moved here; none of its commands may be under way."""
        self._number, self._boot = other._number, other._boot

    def post(self, script: str) -> None:
        """Have ``script`` run without waiting for an answer: for what ends the guest."""
        self._number += 1
        mark = f"posted-{self._number}"
        self._stream.send(f"{mark} {base64.b64encode(script.encode()).decode()} {mark}\n".encode())

    def attempt(self, script: str, limit_s: float) -> Result:
        """Run ``script`` with busybox's shell; returns its exit status and what it wrote to both outputs."""
        self._number += 1
        mark = f"{self._number:d}-{self._boot[:8]}"
        command = f"{mark} {base64.b64encode(script.encode()).decode()} {mark}\n".encode()
        deadline = Deadline(limit_s)
        try:
            answer = self._ask(command, MARK + mark.encode(), deadline)
        except TimeoutError as error:
            raise TimeoutError(f"`{script}` did not end in the guest within {limit_s} s: {error}") from None
        if answer is None:
            raise RestartError(f"the guest restarted during `{script}`")
        _, status, length = answer.split()
        output = self._stream.exactly(int(length), deadline)
        return Result(int(status), output.decode(errors="replace"))

    def _ask(self, command: bytes, mark: bytes, deadline: Deadline) -> bytes | None:
        """The line that answers ``command``; None when the guest says that it starts.

        A serial line may lose a byte of the command or of its answer, once in many thousand: the command is sent again
        after a while, and again after twice as long. The guest runs it once (see ``init.sh``).
        """
        patience_s = REPEAT_S
        self._stream.send(command)
        while True:
            if not self._stream.has_line(min(patience_s, deadline.left_s)) and deadline.left_s:
                self._stream.send(b"\n" + command)
                patience_s *= 2
                continue
            line = self._stream.line(deadline)
            if line.startswith(MARK + b"ready"):
                return None
            if mark in line:
                return line[line.index(mark) :]

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
