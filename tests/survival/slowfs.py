"""A file system with one file, whose writes end when the test says so: storage that outlives the process that used it.

It speaks the kernel's FUSE protocol (linux/fuse.h, version 7.31) over /dev/fuse, with nothing in between. The one
file, ``disk.img``, lives in this process. Every write reaches it around the page cache, many at a time; it is *applied*
at the moment it is answered, so a write that is held is one still in flight. Reads are answered at once.

Needs the right to mount. Touches /dev/fuse, one mount point, one thread of its own.
``python -m tests.survival.slowfs --delay-ms 20 COMMAND...`` runs a command with ``{}`` replaced by the file's path,
while each write is held for a random time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

ROOT: Final = 1
FILE: Final = 2
NAME: Final = "disk.img"
MAX_WRITE: Final = 1 << 20
NEVER: Final = 2**64 - 1

IN_HEADER: Final = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER: Final = struct.Struct("<IiQ")  # len, error, unique
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHI28x")
ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
ENTRY_OUT: Final = struct.Struct("<QQQQII")
ATTR_OUT: Final = struct.Struct("<QII")
OPEN_OUT: Final = struct.Struct("<QIi")
RW_IN: Final = struct.Struct("<QQIIQII")  # fh, offset, size, read or write flags, lock owner, flags, padding
STATFS_OUT: Final = struct.Struct("<QQQQQIIII24x")
SETATTR_SIZE: Final = struct.Struct("<IIQQ")  # valid, padding, fh, size

LOOKUP, FORGET, GETATTR, SETATTR = 1, 2, 3, 4
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 14, 15, 16, 17, 18, 20
FLUSH, INIT, ACCESS, INTERRUPT, BATCH_FORGET = 25, 26, 34, 36, 42
ANSWERED_EMPTY: Final = frozenset({RELEASE, FSYNC, FLUSH, ACCESS})
UNANSWERED: Final = frozenset({FORGET, INTERRUPT, BATCH_FORGET})
FATTR_SIZE: Final = 1 << 3

ASYNC_READ, BIG_WRITES, ASYNC_DIO, MAX_PAGES = 1 << 0, 1 << 5, 1 << 15, 1 << 22
FOPEN_DIRECT_IO, FOPEN_PARALLEL_DIRECT_WRITES = 1 << 0, 1 << 6
MS_NOSUID, MS_NODEV, MNT_DETACH = 2, 4, 2


class CannotMountError(Exception):
    """This machine does not let us mount; the text says why."""


@dataclass(frozen=True, slots=True)
class HeldWrite:
    """A write that has arrived and is not answered: as far as its process knows, it is in flight."""

    unique: int
    pid: int
    offset: int
    data: bytes


class SlowDisk:
    """The mounted file system; unmounted when the block ends.

    ``hold`` decides, on the file system's thread, whether a write is held; what is held waits for `release`.
    """

    def __init__(self, mount_point: Path, size: int, hold: Callable[[HeldWrite], bool] = lambda _: False) -> None:
        """Mount at ``mount_point``, an empty directory, a file of ``size`` zero bytes. Raises `CannotMountError`."""
        self.path: Final = mount_point / NAME
        self.content: Final = bytearray(size)
        self.hold = hold
        self._mount_point: Final = os.fsencode(mount_point)
        self._changed: Final = threading.Condition()
        self._held: dict[int, HeldWrite] = {}
        try:
            self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CannotMountError(f"/dev/fuse: {error.strerror}") from error
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self._fuse},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        flags = MS_NOSUID | MS_NODEV
        if libc.mount(b"slowfs", self._mount_point, b"fuse", ctypes.c_ulong(flags), options.encode()):
            os.close(self._fuse)
            raise CannotMountError(f"mount: {os.strerror(ctypes.get_errno())}")
        self._libc = libc
        self._stop: Final = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: Final = threading.Thread(target=self._serve, name="slowfs")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hold = lambda _: False
        self.release()
        self._libc.umount2(self._mount_point, MNT_DETACH)
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._fuse)  # whoever still waits for an answer gets an error
        os.close(self._stop)

    def held(self) -> list[HeldWrite]:
        """The writes in flight now, oldest first."""
        with self._changed:
            return list(self._held.values())

    def wait_held(self, count: int, limit_s: float) -> list[HeldWrite]:
        """Wait until at least ``count`` writes are held, and return them; raises `AssertionError` after ``limit_s``."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._held) >= count, limit_s), f"{len(self._held)} held"
            return list(self._held.values())

    def release(self, *writes: HeldWrite) -> None:
        """Let ``writes`` happen now, or all that are held."""
        for write in writes or self.held():
            with self._changed:
                if self._held.pop(write.unique, None) is None:
                    continue
            self._apply(write)

    # -- the protocol -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        room = MAX_WRITE + 4096
        while True:
            ready, _, _ = select.select([self._fuse, self._stop], [], [])
            if self._stop in ready:
                return
            try:
                request = os.read(self._fuse, room)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # it was interrupted before we had it
                    continue
                return  # unmounted
            _, opcode, unique, node, _, _, pid, _, _ = IN_HEADER.unpack_from(request)
            self._handle(opcode, unique, node, pid, request[IN_HEADER.size :])

    def _handle(self, opcode: int, unique: int, node: int, pid: int, body: bytes) -> None:
        if opcode in UNANSWERED:
            return
        if opcode == WRITE:
            _, offset, size, _, _, _, _ = RW_IN.unpack_from(body)
            write = HeldWrite(unique, pid, offset, body[RW_IN.size : RW_IN.size + size])
            with self._changed:
                self._held[unique] = write
                if self.hold(write):
                    self._changed.notify_all()
                    return
                del self._held[unique]
            self._apply(write)
        elif opcode in ANSWERED_EMPTY:
            self._answer(unique)
        elif opcode == INIT:
            wanted = struct.unpack_from("<IIII", body)[3]
            flags = wanted & (ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES)
            self._answer(unique, INIT_OUT.pack(7, 31, 0, flags, 64, 64, MAX_WRITE, 1, MAX_WRITE // 4096, 0, 0))
        elif opcode == LOOKUP:
            if body.rstrip(b"\0") != NAME.encode():
                self._answer(unique, error=errno.ENOENT)
            else:
                self._answer(unique, ENTRY_OUT.pack(FILE, 0, 3600, 3600, 0, 0) + self._attributes(FILE))
        elif opcode == SETATTR:
            valid, _, _, size = SETATTR_SIZE.unpack_from(body)
            if valid & FATTR_SIZE:
                del self.content[size:]
                self.content.extend(bytes(size - len(self.content)))
            self._answer(unique, ATTR_OUT.pack(3600, 0, 0) + self._attributes(node))
        elif opcode == GETATTR:
            self._answer(unique, ATTR_OUT.pack(3600, 0, 0) + self._attributes(node))
        elif opcode == OPEN:
            self._answer(unique, OPEN_OUT.pack(0, FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES, 0))
        elif opcode == READ:
            _, offset, size, _, _, _, _ = RW_IN.unpack_from(body)
            self._answer(unique, bytes(self.content[offset : offset + size]))
        elif opcode == STATFS:
            self._answer(unique, STATFS_OUT.pack(1 << 20, 1 << 19, 1 << 19, 1 << 10, 1 << 9, 4096, 255, 4096, 0))
        else:
            self._answer(unique, error=errno.ENOSYS)

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o040755, 0) if node == ROOT else (0o100600, len(self.content))
        return ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)

    def _apply(self, write: HeldWrite) -> None:
        end = write.offset + len(write.data)
        if end > len(self.content):
            self.content.extend(bytes(end - len(self.content)))
        self.content[write.offset : end] = write.data
        self._answer(write.unique, struct.pack("<II", len(write.data), 0))

    def _answer(self, unique: int, payload: bytes = b"", error: int = 0) -> None:
        with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
            os.write(self._fuse, OUT_HEADER.pack(OUT_HEADER.size + len(payload), -error, unique) + payload)


class Delays:
    """Holds every write for a random time of up to ``longest_s``, so that writes end in any order."""

    def __init__(self, disk: SlowDisk, longest_s: float, seed: int) -> None:
        self._disk = disk
        self._longest_s = longest_s
        self._chance = random.Random(seed)
        self._due: list[tuple[float, HeldWrite]] = []
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="delays")

    def __enter__(self) -> Self:
        self._disk.hold = self._hold
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._thread.join()

    def _hold(self, write: HeldWrite) -> bool:
        with self._changed:
            self._due.append((time.monotonic() + self._longest_s * self._chance.random() ** 2, write))
            self._changed.notify_all()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                self._due.sort(key=lambda entry: entry[0])
                ready = [write for due, write in self._due if due <= now or self._over]
                del self._due[: len(ready)]
                if not ready:
                    if self._over:
                        return
                    self._changed.wait(self._due[0][0] - now if self._due else None)
                    continue
            for write in ready:
                self._disk.release(write)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tests.survival.slowfs")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="how long a write is held at most")
    parser.add_argument("--size", type=int, default=128 << 10, help="bytes of the file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slowfs-") as name:
        try:
            disk = SlowDisk(Path(name), options.size)
        except CannotMountError as error:
            print(f"slowfs: {name}: {error}. Run it as a user who may mount.", file=sys.stderr)
            return 1
        with disk, Delays(disk, options.delay_ms / 1000, options.seed):
            return subprocess.run([word.replace("{}", str(disk.path)) for word in options.command]).returncode


if __name__ == "__main__":
    sys.exit(main())
