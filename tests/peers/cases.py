"""What QEMU's own tests of a virtio disk try (tests/qtest: virtio-blk, vhost-user-blk), each over our front-end.

A case is given the socket of a back-end with 8 MiB of random bytes and eight queues; it says in a word or two what the
back-end did. What must hold everywhere it asserts itself. Touches connections.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.guest.processes import Deadline
from tests.peers.raw import (
    DISCARD,
    FLUSH,
    IN,
    LIMIT_S,
    OUT,
    WRITE_ZEROES,
    RawDisk,
    header,
    segment,
)

from vhostuser.errors import BackendRefused, PeerGone
from vhostuser.protocol import FrontendRequest, VringState
from vhostuser.virtio.blk import BlkFeature
from vhostuser.virtio.features import RingFeature

SECTORS: Final = 16384
QUEUES: Final = 8
Case = Callable[[Path], str]


def capacity(path: Path) -> str:
    """The size in the configuration space."""
    with RawDisk(path) as disk:
        return f"{disk.config.capacity} sectors"


def write_then_read(path: Path) -> str:
    """Header, data and status apart."""
    with RawDisk(path) as disk:
        data = os.urandom(8192)
        disk.write(100, data)
        assert disk.read(100, 8192) == data
        assert disk.read(104, 512) == data[2048:2560]
        return disk.request(FLUSH).status


def write_zeroes(path: Path) -> str:
    """Zeroes over what was written, and over nothing else."""
    with RawDisk(path) as disk:
        if not disk.device.features & BlkFeature.WRITE_ZEROES:
            return "not offered"
        disk.write(200, b"\xaa" * 4096)
        status = disk.request(WRITE_ZEROES, data=segment(202, 4)).status
        assert disk.read(200, 4096) == b"\xaa" * 1024 + bytes(2048) + b"\xaa" * 1024
        assert disk.request(WRITE_ZEROES, data=segment(200, 8, 1)).status == "OK"
        assert disk.read(200, 4096) == bytes(4096)
        return status


def discard(path: Path) -> str:
    """What is discarded may hold anything; what lies beside it stays."""
    with RawDisk(path) as disk:
        if not disk.device.features & BlkFeature.DISCARD:
            return "not offered"
        disk.write(300, b"\xbb" * 12288)
        status = disk.request(DISCARD, data=segment(308, 8)).status
        assert disk.read(300, 4096) == disk.read(316, 4096) == b"\xbb" * 4096
        return status


def _invalid(kind: int, segments: Callable[[RawDisk], bytes]) -> Case:
    def case(path: Path) -> str:
        feature = BlkFeature.DISCARD if kind == DISCARD else BlkFeature.WRITE_ZEROES
        with RawDisk(path) as disk:
            if not disk.device.features & feature:
                return "not offered"
            disk.write(0, b"\xcc" * 512)
            answer = disk.request(kind, data=segments(disk))
            assert disk.read(0, 512) == b"\xcc" * 512, "a refused request changes nothing"
            return answer.status

    return case


def _one_too_many(kind: int) -> Callable[[RawDisk], bytes]:
    def segments(disk: RawDisk) -> bytes:
        offered = disk.config.max_discard_seg if kind == DISCARD else disk.config.max_write_zeroes_seg
        return b"".join(segment(2 * number, 1) for number in range(offered + 1))

    return segments


def _used(path: Path, kind: int) -> str:
    with RawDisk(path) as disk:
        room = 4096 if kind == IN else 0
        data = b"\xdd" * 4096 if kind == OUT else b""
        return str(disk.request(kind, 400, data, room).used)


def merged_write(path: Path) -> str:
    """Header and data in one descriptor."""
    with RawDisk(path) as disk:
        answer = disk.frame([header(OUT, 500) + b"\xee" * 512], [1])
        if answer.status == "OK":
            assert disk.read(500, 512) == b"\xee" * 512
        return answer.status


def merged_read(path: Path) -> str:
    """Data and status in one descriptor."""
    with RawDisk(path) as disk:
        disk.write(510, b"\xef" * 512)
        answer = disk.frame([header(IN, 510)], [513])
        assert answer.status != "OK" or answer.data == b"\xef" * 512
        return answer.status


def split_header(path: Path) -> str:
    """The header in three descriptors, the last together with data; the status behind half of the data."""
    with RawDisk(path) as disk:
        head = header(OUT, 520)
        answer = disk.frame([head[:3], head[3:11], head[11:] + b"\x12" * 100, b"\x12" * 412], [1])
        if answer.status == "OK":
            answer = disk.frame([header(IN, 520)[:5], header(IN, 520)[5:]], [100, 413])
            assert answer.data == b"\x12" * 512
        return answer.status


def indirect(path: Path) -> str:
    """Chains in tables of their own."""
    with RawDisk(path, extra=RingFeature.INDIRECT_DESC) as disk:
        if not disk.device.features & RingFeature.INDIRECT_DESC:
            return "not offered"
        data = os.urandom(4096)
        write = disk.frame([header(OUT, 600), data[:1024], data[1024:]], [1], indirect=True)
        read = disk.frame([header(IN, 600)], [512, 3584, 1], indirect=True)
        assert read.data == data
        assert read.status == write.status
        return read.status


def event_index(path: Path) -> str:
    """Asked for a call after two requests, the back-end does not call for the first and calls once for both."""
    with RawDisk(path, extra=RingFeature.EVENT_IDX) as disk:
        if not disk.device.features & RingFeature.EVENT_IDX:
            return "not offered"
        (queue,) = disk.queues
        ring = queue.driver
        _send_and_poll(disk)  # once this is answered the ring runs, and calls that belong to its start have been made
        _calls(queue.call.fileno())
        assert not ring.enable_calls(after=2)
        _send_and_poll(disk)
        assert _calls(queue.call.fileno()) == 0
        _send_and_poll(disk)
        disk.device.stop()  # nothing is called any more once the ring has stopped
        return f"0, then {_calls(queue.call.fileno())}"


def _send_and_poll(disk: RawDisk) -> None:
    ring = disk.queues[0].driver
    disk.send([header(FLUSH)], [1])
    if ring.publish():
        disk.queues[0].notify()
    deadline = Deadline(LIMIT_S)
    while not ring.reap():
        assert deadline.left_s, "a request was not answered"


def _calls(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def foreign_queue(path: Path) -> str:
    """A queue number that the device does not have; whatever it thinks of that, the next connection is served."""
    with RawDisk(path) as disk:
        said = _said_to_foreign_queue(disk)
        if said == "refused":
            disk.write(700, b"\x77" * 512)
    with RawDisk(path) as disk:
        disk.write(700, b"\x78" * 512)
    return said


def _said_to_foreign_queue(disk: RawDisk) -> str:
    dialogue = disk.device.dialogue
    try:
        dialogue.tell(FrontendRequest.SET_VRING_NUM, VringState(QUEUES, 128))
        said = "accepted"
    except BackendRefused:
        said = "refused"
    except PeerGone:
        return "connection closed"
    try:
        dialogue.number(FrontendRequest.GET_FEATURES)
    except PeerGone:
        return f"{said}, then connection closed"
    return said


def eight_queues(path: Path) -> str:
    """Every queue of eight carries requests, and they are one disk."""
    with RawDisk(path, queues=QUEUES) as disk:
        for index in range(QUEUES):
            disk.write(800 + index, bytes([index + 1]) * 512, queue=index)
        for index in range(QUEUES):
            expected = b"".join(bytes([number + 1]) * 512 for number in range(QUEUES))
            assert disk.read(800, 512 * QUEUES, queue=index) == expected
        offered = "MQ" if disk.device.features & BlkFeature.MQ else "no MQ"
        return f"{offered}, {disk.device.max_queues} queues, num_queues {disk.config.num_queues}"


def beyond_the_end(path: Path) -> str:
    """A read that ends one sector behind the disk."""
    with RawDisk(path) as disk:
        return disk.request(IN, SECTORS - 1, room=1024).status


def unknown_type(path: Path) -> str:
    """A type that nobody has defined."""
    with RawDisk(path) as disk:
        return disk.request(0x55).status


def reset_and_again(path: Path) -> str:
    """Stopped, reset and started anew on the same connection."""
    with RawDisk(path) as disk:
        disk.write(900, b"\x90" * 512)
        disk.restart()
        return "OK" if disk.read(900, 512) == b"\x90" * 512 else "lost"


def _both(name: str, segments: Callable[[int], Callable[[RawDisk], bytes]]) -> dict[str, Case]:
    kinds = {"discard": DISCARD, "write_zeroes": WRITE_ZEROES}
    return {f"{word}, {name}": _invalid(kind, segments(kind)) for word, kind in kinds.items()}


CASES: Final[dict[str, Case]] = {
    "capacity": capacity,
    "write, then read": write_then_read,
    "write_zeroes": write_zeroes,
    "discard": discard,
    **_both("one segment more than offered", _one_too_many),
    **_both("a huge number of sectors", lambda _: lambda disk: segment(0, 0xFFFFFFFF)),
    **_both("beyond the end", lambda _: lambda disk: segment(disk.config.capacity - 1, 2)),
    **_both("a first sector whose end overflows", lambda _: lambda disk: segment((1 << 64) - 1, 2)),
    **_both("unknown flags", lambda _: lambda disk: segment(0, 1, 0xFFFFFFFE)),
    "discard, with the unmap flag": _invalid(DISCARD, lambda disk: segment(8, 1, 1)),
    "merged descriptors: header and data": merged_write,
    "merged descriptors: data and status": merged_read,
    "split header": split_header,
    "indirect descriptors": indirect,
    "event index: calls for one request, then for two": event_index,
    "a queue number that the device does not have": foreign_queue,
    "eight queues": eight_queues,
    "read beyond the end": beyond_the_end,
    "unknown request type": unknown_type,
    "stop, reset and start again": reset_and_again,
    "used length of a read of 4096": lambda path: _used(path, IN),
    "used length of a write": lambda path: _used(path, OUT),
}
