"""A disk driven request by request over raw rings: any framing, any content. Touches a connection."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.guest.processes import Deadline, readable

from vhostuser._native import DriverRing
from vhostuser.frontend import USABLE, Buffer, HostDevice, HostQueue, SharedMemory, plain_queue, ring_bytes
from vhostuser.protocol import ProtocolFeature
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig
from vhostuser.virtio.features import RingFeature

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
STATUS: Final = {0: "OK", 1: "IOERR", 2: "UNSUPP"}
LIMIT_S: Final = 20.0
CONFIG_SIZE: Final = 60  # the most that every back-end answers
EVERYTHING: Final = int(
    RingFeature.VERSION_1
    | BlkFeature.FLUSH
    | BlkFeature.DISCARD
    | BlkFeature.WRITE_ZEROES
    | BlkFeature.MQ
    | BlkFeature.CONFIG_WCE
    | BlkFeature.BLK_SIZE
    | BlkFeature.SEG_MAX
)


def header(kind: int, sector: int = 0) -> bytes:
    """The first 16 bytes of a request."""
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, num_sectors: int, flags: int = 0) -> bytes:
    """One segment of a DISCARD or WRITE_ZEROES."""
    return struct.pack("<QII", sector, num_sectors, flags)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: str
    data: bytes
    used: int


class RawDisk:
    """A started device with plain rings."""

    def __init__(
        self,
        path: Path,
        *,
        extra: int = 0,
        queues: int = 1,
        size: int = 128,
        features: int | None = None,
        protocol_features: ProtocolFeature = USABLE,
    ) -> None:
        """``features``: bits to take if offered, `EVERYTHING` unless given; ``extra``: more of them."""
        with ExitStack() as stack:
            wanted = (EVERYTHING if features is None else features) | extra
            device = HostDevice(path, features=wanted, protocol_features=protocol_features)
            self.device = stack.enter_context(device)
            device.realize()
            self.config = VirtioBlkConfig.unpack(device.read_config(0, CONFIG_SIZE).ljust(96, b"\0"))
            self.memory = SharedMemory(queues * ring_bytes(size), 4 << 20)
            self.queues: list[HostQueue[DriverRing]] = []
            for index in range(queues):
                queue = plain_queue(self.memory, index, size, features=device.features)
                stack.callback(queue.close)
                self.queues.append(queue)
            device.start(self.memory, self.queues)
            self._resources = stack.pop_all()

    def restart(self) -> None:
        """Reset the device and start it again; the rings go on where they stopped."""
        self.device.reset()
        self.device.start(self.memory, self.queues)

    def close(self) -> None:
        """Hang up."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(
        self, readable: Sequence[bytes], writable: Sequence[int], *, queue: int = 0, indirect: bool = False
    ) -> tuple[int, list[Buffer]]:
        """Make a chain of readable contents and of writable lengths, unpublished; its head and its writable buffers."""
        ring = self.queues[queue].driver
        filled = []
        for content in readable:
            buffer = self.memory.allocate(len(content))
            buffer.view[:] = content
            filled.append((buffer.guest_addr, len(buffer)))
        room = [self.memory.allocate(length) for length in writable]
        table = None
        if indirect:
            place = self.memory.allocate(16 * (len(filled) + len(room)))
            table = (place.offset, place.guest_addr)
        return ring.add(filled, [(buffer.guest_addr, len(buffer)) for buffer in room], table=table), room

    def wait(self, queue: int = 0) -> list[tuple[int, int]]:
        """Wait for chains to come back, sleeping until the back-end calls. Raises `TimeoutError`."""
        host = self.queues[queue]
        deadline = Deadline(LIMIT_S)
        while not (answered := host.driver.reap()):
            if host.driver.enable_calls():
                continue
            woken = readable([host.call, self.device], deadline.left_s)
            if host.call not in woken:
                raise TimeoutError("the connection ended" if woken else "the back-end did not answer a request")
            host.called()
        return answered

    def frame(self, parts: Sequence[bytes], room: Sequence[int], *, queue: int = 0, indirect: bool = False) -> Answer:
        """One request in any framing: the status is the last writable byte."""
        _, buffers = self.send(parts, room, queue=queue, indirect=indirect)
        buffers[-1].view[-1] = 0xFF
        if self.queues[queue].driver.publish():
            self.queues[queue].notify()
        ((_, used),) = self.wait(queue)
        data = b"".join(bytes(buffer.view) for buffer in buffers)
        return Answer(STATUS.get(data[-1], f"status {data[-1]}"), data[:-1], used)

    def request(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, *, queue: int = 0) -> Answer:
        """One request framed as everybody does: header, data, status."""
        parts = [header(kind, sector), *filter(None, [data])]
        return self.frame(parts, [*filter(None, [room]), 1], queue=queue)

    def read(self, sector: int, length: int, *, queue: int = 0) -> bytes:
        """Read, expecting success."""
        answer = self.request(IN, sector, room=length, queue=queue)
        assert answer.status == "OK"
        return answer.data

    def write(self, sector: int, data: bytes, *, queue: int = 0) -> None:
        """Write, expecting success."""
        assert self.request(OUT, sector, data, queue=queue).status == "OK"
