"""What other people's programs answer, byte for byte, and the quirks they are known for. Touches nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from .backend import CONFIG, Script
from .disk import IOERR, UNSUPP, MemoryDisk

SIZE: Final = 8 << 20
SECTORS: Final = SIZE // 512

BASE_REQUESTS: Final = frozenset({1, 2, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 24, 25})
Answer = Callable[[bytes, bytes], bytes]


def _space(seg_max: int, size_max: int = 0, queues: int = 1) -> bytes:
    """The first 60 bytes of a configuration space: one segment of 32768 sectors to discard or zero."""
    layout = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
    return layout.pack(
        SECTORS, size_max, seg_max, 0, 0, 0, 512, 0, 0, 1, 1, 0, queues, 32768, 1, 1, 32768, 1, 1
    )  # fmt: skip


def padded(request: bytes, config: bytes) -> bytes:
    """As long as was asked, zeroes behind the end (crosvm)."""
    offset, size, _ = CONFIG.unpack_from(request)
    return request[: CONFIG.size] + config[offset : offset + size].ljust(size, b"\0")


def always_268(request: bytes, config: bytes) -> bytes:
    """The whole union, whatever was asked (SPDK's habit)."""
    offset, _, _ = CONFIG.unpack_from(request)
    return request[: CONFIG.size] + config[offset:].ljust(256, b"\0")


def empty_beyond_the_end(request: bytes, config: bytes) -> bytes:
    """libvhost-user: it does not look at the offset. Its error is no payload at all, also for flags other than 0."""
    _, size, flags = CONFIG.unpack_from(request)
    return b"" if flags or size > len(config) else request[: CONFIG.size] + config[:size]


def twelve_beyond_the_end(request: bytes, config: bytes) -> bytes:
    """rust-vmm's error: the three words with a size of 0."""
    offset, size, flags = CONFIG.unpack_from(request)
    return CONFIG.pack(offset, 0, flags) if offset + size > len(config) else padded(request, config)


def always_empty(request: bytes, config: bytes) -> bytes:
    """libvhost-user's error, for every request."""
    return b""


def always_twelve(request: bytes, config: bytes) -> bytes:
    """rust-vmm's error, for every request."""
    offset, _, flags = CONFIG.unpack_from(request)
    return CONFIG.pack(offset, 0, flags)


def what_there_is(request: bytes, config: bytes) -> bytes:
    """Fewer bytes than were asked, without a word."""
    offset, size, flags = CONFIG.unpack_from(request)
    data = config[offset : offset + size]
    return CONFIG.pack(offset, len(data), flags) + data


def _spdk_used(written: int, room: int) -> int:
    return written + 1


def _spdk_disk() -> MemoryDisk:
    return MemoryDisk(
        SIZE,
        exact_framing=True,
        empty_io=UNSUPP,
        odd_io=UNSUPP,
        flush_sector=IOERR,
        too_many_segments=IOERR,
        serial=b"Malloc0",
        pad=b" ",
        used_length=_spdk_used,
    )


def _daemon_disk() -> MemoryDisk:
    return MemoryDisk(SIZE, serial=b"f", used_length=lambda written, room: room)


SPDK: Final = Script(
    name="spdk",
    answers={
        # SIZE_MAX SEG_MAX BLK_SIZE FLUSH MQ DISCARD WRITE_ZEROES LOG_ALL INDIRECT EVENT_IDX bit 30 VERSION_1
        1: bytes.fromhex("01000000 05000000 08000000 46720074 01000000"),
        15: bytes.fromhex("0f000000 05000000 08000000 02020000 00000000"),  # LOG_SHMFD CONFIG
        17: bytes.fromhex("11000000 05000000 08000000 01000000 00000000"),  # answered though MQ is not offered
    },
    config=_space(seg_max=126, size_max=131072),
    config_answer=always_268,
    known=BASE_REQUESTS | {17},
    disk=_spdk_disk,
)

CROSVM: Final = Script(
    name="crosvm",
    answers={
        # SEG_MAX BLK_SIZE FLUSH MQ DISCARD WRITE_ZEROES EVENT_IDX bit 30 VERSION_1; no INDIRECT
        1: bytes.fromhex("01000000 05000000 08000000 44720060 01000000"),
        # MQ REPLY_ACK BACKEND_REQ CONFIG DEVICE_STATE and bit 22, SHMEM
        15: bytes.fromhex("0f000000 05000000 08000000 29024800 00000000"),
        17: bytes.fromhex("11000000 05000000 08000000 10000000 00000000"),
    },
    config=_space(seg_max=126, queues=16),
    config_answer=padded,
    known=BASE_REQUESTS | {17, 21, 42, 43, 44},
    exact_sizes=True,
    max_regions=32,
    disk=lambda: MemoryDisk(SIZE, serial=b"crosvm"),
)

LIBVHOST_USER: Final = Script(
    name="libvhost-user",
    answers={
        # SIZE_MAX SEG_MAX BLK_SIZE FLUSH TOPOLOGY CONFIG_WCE DISCARD WRITE_ZEROES INDIRECT EVENT_IDX bit 30 VERSION_1
        1: bytes.fromhex("01000000 05000000 08000000 466e0070 01000000"),
        # LOG_SHMFD REPLY_ACK BACKEND_REQ CONFIG BACKEND_SEND_FD HOST_NOTIFIER INBAND_NOTIFICATIONS MEM_SLOTS
        15: bytes.fromhex("0f000000 05000000 08000000 2ace0000 00000000"),
        36: bytes.fromhex("24000000 05000000 08000000 20000000 00000000"),
    },
    config=_space(seg_max=126),
    config_answer=empty_beyond_the_end,
    known=BASE_REQUESTS | {21, 36, 37, 38},
    shunned=1 << 14,  # whoever takes INBAND_NOTIFICATIONS is kicked and called by messages
    needs_version_1=True,
    mask_for_bit_30=True,
    disk=_daemon_disk,
)

RUST_VMM: Final = Script(
    name="rust-vmm 0.16",
    answers={
        1: bytes.fromhex("01000000 05000000 08000000 44020070 01000000"),  # SEG_MAX BLK_SIZE FLUSH INDIRECT EVENT_IDX
        15: bytes.fromhex("0f000000 05000000 08000000 09822000 00000000"),  # MQ REPLY_ACK CONFIG MEM_SLOTS, bit 21
        17: bytes.fromhex("11000000 05000000 08000000 01000000 00000000"),
        36: bytes.fromhex("24000000 05000000 08000000 fd010000 00000000"),
    },
    config=_space(seg_max=126),
    config_answer=twelve_beyond_the_end,
    known=BASE_REQUESTS | {17, 36, 37, 38},
    shunned=1 << 21,  # SHMEM to this crate, GPA_ADDRESSES to everybody else
    exact_sizes=True,
    disk=lambda: MemoryDisk(SIZE, serial=b"rust-vmm"),
)

SHORT_CONFIG: Final = replace(CROSVM, name="short config", config_answer=what_there_is)
NO_CONFIG_LVU: Final = replace(LIBVHOST_USER, name="no config (empty)", config_answer=always_empty)
NO_CONFIG_RVM: Final = replace(RUST_VMM, name="no config (12 bytes)", config_answer=always_twelve)

PROGRAMS: Final = (SPDK, CROSVM, LIBVHOST_USER, RUST_VMM)
"""Programs that a front-end must be able to use."""
