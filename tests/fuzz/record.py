"""Records what real front-ends say: `python -m tests.fuzz.record [NAME...]`, names as in `FRONT_ENDS`.

A proxy stands between a front-end and `vhostuser serve`: every byte and descriptor goes on as it came, and the messages
of the front-end are kept in ``conversations``, one per line with the kinds of its descriptors, for the fuzzer to start
from. Touches: processes, sockets, that directory.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from tests.fuzz.seeds import CONVERSATIONS
from tests.guest.backends import Export, Ours
from tests.guest.machines import Disk, Guest
from tests.guest.prepare import machine, present

import vhostuser

HEADER: Final = 12
MOST_MESSAGES: Final = 120
IMAGE: Final = 8 << 20


class Recorder:
    """A proxy for one back-end; ``messages`` grows while front-ends talk."""

    def __init__(self, path: Path, backend: Path) -> None:
        self.messages: list[tuple[bytes, list[str]]] = []
        self._backend = backend
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            front = self._listener.accept()[0]
            back = socket.socket(socket.AF_UNIX)
            back.connect(str(self._backend))
            with suppress(OSError, EOFError):  # one end has gone
                self._relay(front, back)

    def _relay(self, front: socket.socket, back: socket.socket) -> None:
        """One connection, until one end closes it."""
        with front, back:
            while True:
                for end in select.select([front, back], [], [])[0]:
                    message, fds = whole_message(end)
                    if end is front:
                        self.messages.append((message, [kind_of(fd) for fd in fds]))
                    socket.send_fds(back if end is front else front, [message], fds)
                    for fd in fds:
                        os.close(fd)


def whole_message(end: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors, which come with its first byte. Raises `EOFError`."""
    data, fds, _, _ = socket.recv_fds(end, HEADER, 253)
    while len(data) < HEADER or len(data) < HEADER + int.from_bytes(data[8:12], sys.byteorder):
        due = HEADER if len(data) < HEADER else HEADER + int.from_bytes(data[8:12], sys.byteorder)
        more = end.recv(due - len(data)) if data else b""
        if not more:
            raise EOFError
        data += more
    return data, fds


def kind_of(fd: int) -> str:
    """What a descriptor is, in one word."""
    name = os.readlink(f"/proc/self/fd/{fd}")
    for start, kind in (("/memfd:vhostuser-inflight", "region"), ("/memfd:", "memory"), ("anon_inode:", "event")):
        if name.startswith(start):
            return kind
    return "socket" if name.startswith("socket:") else "other"


def write(name: str, how: str, messages: list[tuple[bytes, list[str]]]) -> None:
    """Keeps a conversation; every message once in the form in which it came first, the rest in order."""
    lines = [f"# {name}: {how}. Recorded by tests/fuzz/record.py; a message and the kinds of its descriptors a line."]
    lines += [f"{data.hex()} {','.join(kinds) or '-'}" for data, kinds in messages[:MOST_MESSAGES]]
    (CONVERSATIONS / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"{name}: {len(messages)} messages", flush=True)


def guest(version: str) -> Callable[[Path, Path], str]:
    """A guest of one QEMU: firmware, kernel, some requests, a reset and the same again."""

    def talk(path: Path, directory: Path) -> str:
        qemu = next(qemu for qemu in present() if qemu.name == version)
        disk = Disk(path, options={"num-queues": 2})
        with Guest(qemu, machine(), directory, [disk]) as running:
            running.wait_ready()
            running.run("dd if=/dev/vda of=/dev/null bs=64k count=16 2>/dev/null")
            running.reset()
        return (
            f"QEMU {version} -device vhost-user-blk-pci,num-queues=2, TCG, Debian's cloud kernel, with one system_reset"
        )

    return talk


def ours(path: Path, directory: Path) -> str:
    """Our own client."""
    with vhostuser.connect(str(path)) as disk:
        disk.write(0, b"recorded" * 64)
        disk.read(0, 512)
        disk.flush()
    return "vhostuser.connect, one write, read and flush"


FRONT_ENDS: Final[dict[str, Callable[[Path, Path], str]]] = {
    "qemu-7.2": guest("7.2"),
    "qemu-10.0": guest("10.0"),
    "qemu-11.1": guest("11.1"),
    "ours": ours,
}


def main() -> int:
    for name in sys.argv[1:] or FRONT_ENDS:
        with tempfile.TemporaryDirectory(prefix="vhostuser-record-") as place:
            directory = Path(place)
            subprocess.run(["truncate", "-s", str(IMAGE), str(directory / "image")], check=True)
            with Ours(directory / "image", directory, Export(queues=2)) as backend:
                recorder = Recorder(directory / "front", backend.socket)
                how = FRONT_ENDS[name](directory / "front", directory)
                write(name, how, recorder.messages)
    return 0


if __name__ == "__main__":
    sys.exit(main())
