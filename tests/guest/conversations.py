"""Records what a migrating QEMU says to both back-ends: ``python -m tests.guest.conversations [QEMU [OPTION...]]``.

Writes one line for each message, in the order in which they came by, with what the two QEMUs and their operator do in
between. ``QEMU`` is a version, 10.0 without one; an ``OPTION`` is one of the device's, like
``inflight-migration=on``. Touches: processes, sockets, a directory of its own.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from tests.guest.backends import Export, Ours
from tests.guest.images import MIB, blank
from tests.guest.loads import RandomLoad
from tests.guest.machines import Disk, Guest, Setup
from tests.guest.migrations import begin, completed, end_of
from tests.guest.prepare import machine, present

from vhostuser.protocol import Connection, Message, Refused, Reply, Role, describe
from vhostuser.virtio.blk import BlkFeature

HEADER: Final = 12
MOST_FDS: Final = 253
MEMORY_MIB: Final = 128
LIMIT_S: Final = 60.0


class Journal:
    """Lines in the order of what happened; several threads write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        """Add a line."""
        with self._lock:
            self.lines.append(line)


class Ear:
    """Understands one connection from both ends, as two observers that are told what passes."""

    def __init__(self, journal: Journal, who: str) -> None:
        self._journal = journal
        self._who = who
        self._asked: Connection[str] = Connection(Role.BACKEND)
        self._asks: Connection[str] = Connection(Role.FRONTEND)
        self._owed: Message[str] | Refused | None = None

    def request(self, data: bytes, fds: int) -> None:
        """The front-end has sent a whole message with so many descriptors."""
        self._asked.receive(data, ["fd"] * fds)
        event = self._asked.next_event()
        assert isinstance(event, Message | Refused)
        self._journal.note(f"{self._who} > {describe(event, BlkFeature)}")
        self._owed = event
        if isinstance(event, Message):
            self._asks.send(event)

    def reply(self, data: bytes, fds: int) -> None:
        """The back-end has answered."""
        self._asks.receive(data, ["fd"] * fds)
        event = self._asks.next_event()
        assert isinstance(event, Reply)
        assert isinstance(self._owed, Message)
        self._journal.note(f"{self._who} < {describe(event, BlkFeature)}")
        if event.ack:
            self._asked.acknowledge(self._owed)
        else:
            self._asked.answer(self._owed, event.payload, event.fds)


class Relay:
    """Stands between a front-end and the back-end on ``backend``; bytes and descriptors go on as they came."""

    def __init__(self, path: Path, backend: Path, journal: Journal, who: str) -> None:
        self._backend, self._journal, self._who = backend, journal, who
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            front = self._listener.accept()[0]
            back = socket.socket(socket.AF_UNIX)
            back.connect(str(self._backend))
            self._journal.note(f"{self._who} | connected")
            with front, back, suppress(OSError, EOFError):  # one end has gone
                self._relay(front, back)
            self._journal.note(f"{self._who} | disconnected")

    def _relay(self, front: socket.socket, back: socket.socket) -> None:
        ear = Ear(self._journal, self._who)
        while True:
            for end in select.select([front, back], [], [])[0]:
                data, fds = whole_message(end)
                note = ear.request if end is front else ear.reply
                note(data, len(fds))
                socket.send_fds(back if end is front else front, [data], fds)
                for fd in fds:
                    os.close(fd)


def whole_message(end: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors, which come with its first byte. Raises `EOFError`."""
    data, fds, _, _ = socket.recv_fds(end, HEADER, MOST_FDS)
    while len(data) < HEADER or len(data) < HEADER + int.from_bytes(data[8:12], sys.byteorder):
        due = HEADER if len(data) < HEADER else HEADER + int.from_bytes(data[8:12], sys.byteorder)
        more = end.recv(due - len(data)) if data else b""
        if not more:
            raise EOFError
        data += more
    return data, fds


def record(version: str, options: dict[str, str | int | bool]) -> list[str]:
    """Move a guest of this QEMU that writes all the time, and return what was said."""
    qemu = next(qemu for qemu in present() if qemu.name == version)
    journal = Journal()
    with tempfile.TemporaryDirectory(prefix="vhr-") as place, ExitStack() as stack:
        directory = Path(place)
        image = blank(directory / "disk.img", 4 * MIB)
        setup = Setup(memory_mib=MEMORY_MIB)

        def side(name: str, *, incoming: bool) -> Guest:
            backend = stack.enter_context(Ours(image, directory, Export(queues=1, incoming=incoming)))
            Relay(directory / name, backend.socket, journal, name)
            disk = Disk(directory / name, options=options)
            return stack.enter_context(Guest(qemu, machine(), directory, [disk], setup, incoming=incoming))

        source = side("source     ", incoming=False).wait_ready()
        load = RandomLoad("vda", image, 2)
        load.start(source)
        load.wait_writes(source)
        destination = side("destination", incoming=True)
        journal.note(f"-- QEMU {version}: migrate")
        begin(source, destination, directory / "road")
        source.qmp.wait("STOP", LIMIT_S)
        completed(source)
        journal.note("-- the source has sent everything")
        destination.qmp.wait("RESUME", LIMIT_S)
        assert end_of(destination) == "completed"
        destination.continues(source)
        journal.note("-- the guest runs at the destination; quit the source")
        source.process.close()
        load.ended(destination)
        return list(journal.lines)


def main(words: Sequence[str]) -> int:
    """Record and print. Returns the exit status."""
    version, *options = words or ["10.0"]
    print("\n".join(record(version, dict(option.split("=", 1) for option in options))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
