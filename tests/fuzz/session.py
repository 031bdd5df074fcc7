"""A whole back-end session of a virtio disk over a socket pair, with real descriptors and a hostile front-end.

Nothing may come out of a session, it may log no error of its own, and when it is over there are as many descriptors and
threads as before. The session runs on the caller's thread: the next message is sent whenever it reads.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from struct import pack
from typing import Final

from tests.fuzz.choices import Choices
from tests.fuzz.messages import AVAIL, GUEST, MEMORY, RING, USED, USER, Req, good, message

from vhostuser.backend import Session
from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.fds import Fd
from vhostuser.protocol import F_PROTOCOL_FEATURES, MAX_PAYLOAD
from vhostuser.transport import Transport

PLAYS_PER_DEVICE: Final = 500
MAX_STEPS: Final = 60
FEATURES: Final = F_PROTOCOL_FEATURES | 1 << 32 | 1 << 29 | 1 << 28 | 1 << 13 | 1 << 14 | 1 << 9 | 1 << 11
SIZE: Final = 64


class Complaints(logging.Handler):
    """Formats every record, and keeps those that a session must not write."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.exc_info or "worker failed" in text:
            self.found.append(text)


COMPLAINTS: Final = Complaints()


class FrontEnd:
    """Our end of the socket pair, its memory and its descriptors."""

    def __init__(self, ours: socket.socket, choices: Choices) -> None:
        self._socket = ours
        self._choices = choices
        self._owned: list[int] = []
        self._steps = 0
        self._replies = b""
        self._ended = False
        self._given_away = False
        self.memory = self._own(os.memfd_create("fuzz"))
        os.ftruncate(self.memory, MEMORY)
        self.kick = self._own(os.eventfd(0, os.EFD_NONBLOCK))
        self.call = self._own(os.eventfd(0, os.EFD_NONBLOCK))

    def _own(self, fd: int) -> int:
        self._owned.append(fd)
        return fd

    def close(self) -> None:
        for fd in self._owned:
            os.close(fd)
        self._socket.close()

    def step(self) -> None:
        """Sends something more, or ends the stream. Called when the session has read all there was."""
        self._look_at_replies()
        while not self._ended:
            if not self._choices or self._steps >= MAX_STEPS:
                self._ended = True
                self._socket.shutdown(socket.SHUT_WR)
                return
            self._steps += 1
            if self._act():
                return

    def _act(self) -> bool:
        """One action; True when bytes were sent."""
        match self._choices.number() % 10:
            case 0:
                return self._set_up()
            case 1:
                self._store()
            case 2:
                self._request()
            case 3:
                os.eventfd_write(self.kick, 1)
            case 4 if self._choices.number() % 8 == 0:
                os.ftruncate(self.memory, self._choices.pick((0, 4096, MEMORY)))
            case _:
                _, data = message(self._choices)
                return self._send(
                    data, [self._descriptor() for _ in range(self._choices.pick((0, 0, 1, 1, 1, 2, 9, 33)))]
                )
        return False

    def _send(self, data: bytes, fds: list[int]) -> bool:
        try:
            socket.send_fds(self._socket, [data], fds[:253], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:  # the session has hung up, or does not read
            self._ended = True
        return True

    def _descriptor(self) -> int:
        """A descriptor of some kind, most often one that fits."""
        make: Callable[[], int] = self._choices.pick(
            (
                *(lambda: self.memory,) * 4,
                *(lambda: self.kick,) * 2,
                *(lambda: self.call,) * 2,
                lambda: self._own(os.memfd_create("small")),
                lambda: self._own(os.open("/dev/null", os.O_RDWR)),
                lambda: self._own(os.open("/dev/zero", os.O_RDONLY)),
                lambda: self._own(os.open("/", os.O_RDONLY)),
                lambda: self._pipe(0),
                lambda: self._pipe(1),
                self._full,
                self._ourselves,
                self._pair,
                self._file,
                self._sealed,
            )
        )
        return make()

    def _ourselves(self) -> int:
        self._given_away = True
        return self._own(os.dup(self._socket.fileno()))

    def _full(self) -> int:
        fd = self._own(os.eventfd(0))
        os.eventfd_write(fd, 2**64 - 2)
        return fd

    def _pipe(self, end: int) -> int:
        ends = os.pipe2(os.O_NONBLOCK)
        os.close(ends[1 - end])
        return self._own(ends[end])

    def _pair(self) -> int:
        one, two = socket.socketpair()
        self._own(two.detach())
        return self._own(one.detach())

    def _file(self) -> int:
        with tempfile.TemporaryFile() as file:
            file.truncate(MEMORY)
            return self._own(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY))

    def _sealed(self) -> int:
        fd = self._own(os.memfd_create("sealed", os.MFD_ALLOW_SEALING))
        os.ftruncate(fd, MEMORY)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        return fd

    def _set_up(self) -> bool:
        """All that it takes to run a ring, up to a point."""
        ring = self._choices.number() % 2
        at = USER + ring * RING
        steps: list[tuple[bytes, list[int]]] = [
            (good(Req.SET_FEATURES, pack("=Q", FEATURES)), []),
            (good(Req.GET_PROTOCOL_FEATURES), []),
            (good(Req.SET_PROTOCOL_FEATURES, pack("=Q", 0x1_8A2B & ~(1 << 15) | 1 << 15)), []),
            (good(Req.SET_MEM_TABLE, pack("=IIQQQQ", 1, 0, GUEST, MEMORY, USER, 0)), [self.memory]),
            (good(Req.SET_VRING_NUM, pack("=II", ring, SIZE)), []),
            (good(Req.SET_VRING_BASE, pack("=II", ring, 0)), []),
            (good(Req.SET_VRING_ADDR, pack("=IIQQQQ", ring, 0, at, at + USED, at + AVAIL, 0)), []),
            (good(Req.SET_VRING_CALL, pack("=Q", ring)), [self.call]),
            (good(Req.SET_VRING_KICK, pack("=Q", ring)), [self.kick]),
            (good(Req.SET_VRING_ENABLE, pack("=II", ring, 1)), []),
        ]
        count = self._choices.number()
        for data, fds in steps[: len(steps) - (count if count < len(steps) else 0)]:
            self._send(data, fds)
        return True

    def _store(self) -> None:
        """Anything anywhere in guest memory."""
        at = self._choices.number(3) % MEMORY
        os.pwrite(self.memory, self._choices.take(min(self._choices.number(), MEMORY - at)), at)

    def _request(self) -> None:
        """A request to the disk in a ring, nearly right."""
        choices, ring = self._choices, (self._choices.number() % 2) * RING
        header = 0xC000 + 64 * (choices.number() % 32)
        kind, sector = choices.pick((0, 1, 4, 8, 11, 13, 5, 255)), choices.number(2)
        os.pwrite(self.memory, pack("<IIQ", kind, 0, sector) + pack("<QII", sector, choices.number(), 0), header)
        length = choices.pick((512, 0, 4096, 511, 2**31))
        writes = 2 if kind in (0, 8) else 0
        more = 0 if kind == 4 else 16
        table = pack("<QIHH", GUEST + header, 16 + more * (kind > 8), 1, 1)
        table += pack("<QIHH", GUEST + 0x10000 + choices.number(2), length, 1 | writes, 2)
        table += pack("<QIHH", GUEST + header + 48, 1, choices.pick((2, 2, 2, 0, 3, 4)), choices.number())
        os.pwrite(self.memory, table, ring)
        old = int.from_bytes(os.pread(self.memory, 2, ring + AVAIL + 2), "little")
        os.pwrite(self.memory, pack("<H", choices.pick((0, 0, 0, 1, 70))), ring + AVAIL + 4 + 2 * (old % SIZE))
        os.pwrite(self.memory, pack("<H", (old + choices.pick((1, 1, 1, 2, 70))) % 65536), ring + AVAIL + 2)

    def _look_at_replies(self) -> None:
        """Every answer is a header with the flags of a reply and so many bytes as it says.

        Whoever gives his own end away, as a kick or a channel, has others read from it and can expect nothing.
        """
        while True:
            try:
                data = self._socket.recv(65536, socket.MSG_DONTWAIT)
            except OSError:
                break
            if not data:
                break
            self._replies += data
        while len(self._replies) >= 12 and not self._given_away:
            flags, size = (int.from_bytes(self._replies[at : at + 4], "little") for at in (4, 8))
            assert flags == 5, f"a reply has flags {flags:#x}"
            assert size <= MAX_PAYLOAD
            if len(self._replies) < 12 + size:
                break
            self._replies = self._replies[12 + size :]


class Fed(Transport):
    """A transport whose peer acts when everything was read."""

    def __init__(self, sock: socket.socket, peer: FrontEnd) -> None:
        super().__init__(sock, send_timeout_s=1.0)
        self._peer = peer

    def receive(self, want: int) -> tuple[bytes, list[Fd]]:
        received = super().receive(want)
        if received[0] and not _readable(self._socket):
            self._peer.step()
        return received


def _readable(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True


class Stage:
    """The device that all plays share for a while, and the ear for what nobody may say."""

    def __init__(self) -> None:
        self._device: BlockDevice | None = None
        self._plays = 0
        self._restore = ExitStack()

    def device(self) -> BlockDevice:
        """The device for the next play."""
        if self._device is None or self._plays % PLAYS_PER_DEVICE == 0:
            self.close()
            self._listen()
            self._device = BlockDevice(MemoryDisk(1 << 20), num_queues=2, num_workers=1)
        self._plays += 1
        return self._device

    def _listen(self) -> None:
        """Hear all that is logged, down to the last detail, and what goes wrong where nothing can be raised."""
        logger = logging.getLogger("vhostuser")
        self._restore.callback(setattr, logger, "propagate", logger.propagate)
        logger.propagate = False
        self._restore.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(COMPLAINTS)
        self._restore.callback(logger.removeHandler, COMPLAINTS)
        self._restore.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = lambda raised: COMPLAINTS.found.append(f"{raised.err_msg}: {raised.exc_value!r}")

    def close(self) -> None:
        """End the device, and leave logging as it was."""
        if self._device is not None:
            self._device.close()
            self._device = None
            gc.collect()  # the queues' own descriptors go with the queues
        self._restore.close()


STAGE: Final = Stage()


def _open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def one(data: bytes) -> None:
    """Plays one input."""
    device = STAGE.device()
    fds, threads, tasks = _open_fds(), threading.active_count(), len(os.listdir("/proc/self/task"))
    ours, theirs = socket.socketpair()
    peer = FrontEnd(ours, Choices(data))
    try:
        peer.step()
        Session(device, Fed(theirs, peer), drain_timeout_s=10.0).run()
    finally:
        theirs.close()
        peer.close()
    complaints, COMPLAINTS.found = COMPLAINTS.found, []
    assert not complaints, "\n".join(complaints)
    assert not device.connected
    assert _open_fds() == fds, "descriptors were left, or closed that were not the session's"
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == (threads, tasks), "threads were left"
