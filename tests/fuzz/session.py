"""A whole back-end session of a virtio disk over a socket pair, with real descriptors and a hostile front-end.

Nothing may come out of a session, it may log no error of its own, and when it is over there are as many descriptors and
threads as before. The session runs on the caller's thread: the next message is sent whenever it reads.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from struct import pack
from typing import Final

from tests.fuzz.choices import Choices
from tests.fuzz.descriptors import Descriptors
from tests.fuzz.messages import AVAIL, GUEST, MEMORY, QUEUE, REGION, RING, USED, USER, Req, good, message
from tests.fuzz.seeds import KINDS, RECORDED

from vhostuser.backend import Session
from vhostuser.blk import BlockDevice
from vhostuser.disks import MemoryDisk
from vhostuser.fds import Fd
from vhostuser.protocol import F_LOG_ALL, F_PROTOCOL_FEATURES, MAX_PAYLOAD
from vhostuser.protocol import ProtocolFeature as Protocol
from vhostuser.transport import Transport

PLAYS_PER_DEVICE: Final = 500
MAX_STEPS: Final = 130
FEATURES: Final = F_PROTOCOL_FEATURES | 1 << 32 | 1 << 29 | 1 << 28 | 1 << 13 | 1 << 14 | 1 << 9 | 1 << 11
PROTOCOL_FEATURES: Final = (
    Protocol.MQ | Protocol.REPLY_ACK | Protocol.BACKEND_REQ | Protocol.CONFIG | Protocol.BACKEND_SEND_FD
    | Protocol.LOG_SHMFD | Protocol.INFLIGHT_SHMFD
    | Protocol.RESET_DEVICE | Protocol.CONFIGURE_MEM_SLOTS | Protocol.STATUS
)  # fmt: skip
SIZE: Final = 64


class Complaints(logging.Handler):
    """Formats every record, and keeps those that a session must not write."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.INFO:
            self.last = text
        if record.exc_info or "worker failed" in text:
            self.found.append(text)


COMPLAINTS: Final = Complaints()


class FrontEnd:
    """Our end of the socket pair, its memory and its descriptors."""

    def __init__(self, ours: socket.socket, choices: Choices) -> None:
        self._socket = ours
        self._choices = choices
        self._fds = Descriptors()
        self._steps = 0
        self._replies = b""
        self._ended = False
        self._given_away = False
        self.memory = self._fds.own(os.memfd_create("fuzz"))
        os.ftruncate(self.memory, MEMORY)
        self.region = self._fds.own(os.memfd_create("region"))
        os.ftruncate(self.region, REGION)
        self.kick = self._fds.own(os.eventfd(0, os.EFD_NONBLOCK))
        self.call = self._fds.own(os.eventfd(0, os.EFD_NONBLOCK))

    def close(self) -> None:
        self._fds.close()
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
        action = self._choices.number()
        if action >= RECORDED:
            return self._say_recorded() if action == RECORDED else self._track(action)
        match action % 10:
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

    def _say_recorded(self) -> bool:
        """A message of a conversation, with descriptors of the kinds that it had."""
        data = self._choices.take(self._choices.number(2))
        kinds = [KINDS[self._choices.number() % len(KINDS)] for _ in range(min(self._choices.number(), 33))]
        make: dict[str, Callable[[], int]] = {
            "memory": self._fds.vast,
            "event": lambda: self.kick,
            "region": lambda: self.region,
            "socket": self._fds.pair,
        }
        return self._send(data, [make.get(kind, self._fds.null)() for kind in kinds]) if data else False

    def _track(self, action: int) -> bool:
        """What a front-end does with an in-flight region: ask for one, hand one over, spoil it, take it away."""
        described = pack("=QQHH4x", REGION, 0, 2, 128)
        match action:
            case 251:
                return self._send(good(Req.GET_INFLIGHT_FD, pack("=QQHH4x", 0, 0, 2, 128)), [])
            case 252:
                return self._send(good(Req.SET_INFLIGHT_FD, described, need_reply=True), [self.region])
            case 253:
                at = self._choices.number(2) % REGION
                self._try(lambda: os.pwrite(self.region, self._choices.take(self._choices.number() % 33), at))
            case 254:
                # A region as a device leaves it that dies with requests in flight.
                at, head = QUEUE * (self._choices.number() % 2), self._choices.number() % SIZE
                self._try(lambda: os.pwrite(self.region, pack("<HHHH", 1, SIZE, head, self._choices.number()), at + 8))
                self._try(lambda: os.pwrite(self.region, pack("<B5xHQ", 1, head, head), at + 16 + 16 * head))
            case _:
                size = self._choices.pick((0, 16, REGION - 1))
                self._try(lambda: os.ftruncate(self.region, size))
        return False

    @staticmethod
    def _try(change: Callable[[], object]) -> None:
        """The back-end's own regions cannot be made shorter."""
        with suppress(PermissionError):
            change()

    def _send(self, data: bytes, fds: list[int]) -> bool:
        try:
            socket.send_fds(self._socket, [data], fds[:253], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:  # the session has hung up, or does not read
            self._ended = True
        return True

    def _descriptor(self) -> int:
        """A descriptor of some kind, most often one that fits."""
        own = self._choices.pick(
            (*(self.memory,) * 4, *(self.kick,) * 2, *(self.call,) * 2, *(self.region,) * 3, *(-1,) * 17)
        )
        if own >= 0:
            return own
        make = self._choices.pick((self._ourselves, *self._fds.kinds()))
        return make()

    def _ourselves(self) -> int:
        self._given_away = True
        return self._fds.own(os.dup(self._socket.fileno()))

    def _set_up(self) -> bool:
        """All that it takes to run a ring, up to a point."""
        ring = self._choices.number() % 2
        at = USER + ring * RING
        count = self._choices.number()
        features = self._choices.pick((FEATURES, FEATURES, FEATURES | F_LOG_ALL))
        steps: list[tuple[bytes, list[int]]] = [
            (good(Req.SET_FEATURES, pack("=Q", features)), []),
            (good(Req.GET_PROTOCOL_FEATURES), []),
            (good(Req.SET_PROTOCOL_FEATURES, pack("=Q", PROTOCOL_FEATURES)), []),
            (good(Req.SET_MEM_TABLE, pack("=IIQQQQ", 1, 0, GUEST, MEMORY, USER, 0)), [self.memory]),
            (good(Req.SET_VRING_NUM, pack("=II", ring, SIZE)), []),
            (good(Req.SET_VRING_BASE, pack("=II", ring, 0)), []),
            (good(Req.SET_VRING_ADDR, pack("=IIQQQQ", ring, 0, at, at + USED, at + AVAIL, 0)), []),
            (good(Req.SET_VRING_CALL, pack("=Q", ring)), [self.call]),
            (good(Req.SET_VRING_KICK, pack("=Q", ring)), [self.kick]),
            (good(Req.SET_VRING_ENABLE, pack("=II", ring, 1)), []),
        ]
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
                data, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(8 * 4), socket.MSG_DONTWAIT)
            except OSError:
                break
            for _, _, found in ancillary:
                for fd in memoryview(found).cast("i"):
                    self.region = self._fds.own(fd)
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
