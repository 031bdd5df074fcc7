"""Front-end messages, good and bad, out of a fuzzer's bytes. Touches nothing."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack
from typing import Final

from tests.fuzz.choices import Choices

from vhostuser.protocol import F_LOG_ALL, F_PROTOCOL_FEATURES, FrontendRequest

Req = FrontendRequest

GUEST: Final = 0x10_0000
USER: Final = 0x7000_0000
MEMORY: Final = 0x2_0000
RING: Final = 0x4000
"""Between two rings: the tables of ring ``i`` begin at ``i * RING``, as a driver would lay them out."""

QUEUE: Final = 2112
"""The bytes of an in-flight region for one ring of 128, the size of QEMU's."""

REGION: Final = 2 * QUEUE

AVAIL: Final = 0x1000
USED: Final = 0x2000


def index(choices: Choices) -> int:
    """A ring, most often one that is there."""
    return choices.pick((0, 0, 1, 1, 0, 1, 2, 255, 0x1_0000, 2**32 - 1))


def state(choices: Choices) -> bytes:
    return pack("=II", index(choices), choices.pick((0, 1, 2, 8, 64, 256, 32768, 65535, 65536, choices.number(4))))


def u64(choices: Choices) -> bytes:
    number = choices.number()
    if number == 255:
        return pack("=Q", choices.number(8))
    features = F_PROTOCOL_FEATURES | 1 << 32 | 1 << 29
    usual = (0, 1, 15, 1 << 12 | 1 << 5 | 1 << 3 | 2, 0xFFFF_FFFF_FFFF, features, features | F_LOG_ALL)
    return pack("=Q", usual[number % len(usual)])


def addr(choices: Choices) -> bytes:
    ring = index(choices)
    base = USER + (ring & 3) * RING + choices.pick((0, 0, 0, 0, 1, 16, MEMORY, 2**40))
    return pack("=IIQQQQ", ring, choices.pick((0, 0, 1, 1, 2)), base, base + USED, base + AVAIL, choices.number(2))


def region(choices: Choices) -> bytes:
    guest = GUEST + choices.pick((0, 0, 0x1000, MEMORY, 2 * MEMORY, 2**64 - GUEST - 1))
    size = choices.pick((MEMORY, MEMORY, 0x1000, 1, 0, 0x1235, 2**63, 2**64 - 1))
    user = USER + choices.pick((0, 0, 0x1000, MEMORY, 2**64 - USER - 1))
    return pack("=QQQQ", guest, size, user, choices.pick((0, 0, 0, 1, 0x1000, 2**63)))


def table(choices: Choices) -> bytes:
    count = choices.pick((1, 1, 1, 2, 3, 8, 0, 9))
    said = choices.pick((count, count, count, count + 1, 2**32 - 1))
    return pack("=II", said, 0) + b"".join(region(choices) for _ in range(count))


def single(choices: Choices) -> bytes:
    return pack("=Q", 0) + region(choices)


def vring_fd(choices: Choices) -> bytes:
    return pack("=Q", (index(choices) & 0xFF) | choices.pick((0, 0, 0, 0x100, 0x8000_0000)))


def config(choices: Choices) -> bytes:
    size = choices.pick((60, 1, 0, 256, 36, 4084, 2**32 - 1))
    offset = choices.pick((0, 32, 8, 4096, 2**32 - 1))
    carried = choices.take(min(size, 64)).ljust(min(size, 300), b"\1")
    return pack("=III", offset, size, choices.pick((0, 1, 2))) + carried


def inflight(choices: Choices) -> bytes:
    """Most often the description of a region that there is, for two rings of 128."""
    size = choices.pick((REGION, REGION, REGION, REGION - QUEUE, 0, 2**63, 2**64 - 1))
    offset = choices.pick((0, 0, 0, 0, 8, 4, 4096, 2**64 - 8))
    queues, queue_size = choices.pick((2, 2, 2, 1, 0, 3, 65535)), choices.pick((128, 128, 128, 64, 0, 32768))
    return pack("=QQHH4x", size, offset, queues, queue_size)


def log_base(choices: Choices) -> bytes:
    """A dirty log: a bit for each page of memory."""
    size = choices.pick((MEMORY, 0x1000, 64, 1, 0, 2**63, 2**64 - 1))
    return pack("=QQ", size, choices.pick((0, 0, 0, 1, 8, 0x1000, 2**64 - 8)))


PAYLOADS: Final[dict[int, Callable[[Choices], bytes]]] = {
    Req.SET_FEATURES: u64,
    Req.SET_PROTOCOL_FEATURES: u64,
    Req.SET_STATUS: u64,
    Req.SET_MEM_TABLE: table,
    Req.ADD_MEM_REG: single,
    Req.REM_MEM_REG: single,
    Req.SET_VRING_NUM: state,
    Req.SET_VRING_BASE: state,
    Req.GET_VRING_BASE: state,
    Req.SET_VRING_ENABLE: state,
    Req.SET_VRING_ADDR: addr,
    Req.SET_VRING_KICK: vring_fd,
    Req.SET_VRING_CALL: vring_fd,
    Req.SET_VRING_ERR: vring_fd,
    Req.GET_CONFIG: config,
    Req.SET_CONFIG: config,
    Req.SET_LOG_BASE: log_base,
    Req.GET_INFLIGHT_FD: inflight,
    Req.SET_INFLIGHT_FD: inflight,
}

ALONE: Final = (
    *(Req.GET_FEATURES, Req.SET_OWNER, Req.RESET_OWNER, Req.GET_PROTOCOL_FEATURES, Req.GET_QUEUE_NUM, Req.RESET_DEVICE),
    *(Req.GET_MAX_MEM_SLOTS, Req.GET_STATUS, Req.SET_BACKEND_REQ_FD),
)
"""Requests without a payload."""


def message(choices: Choices) -> tuple[int, bytes]:
    """The number of a request and its bytes; a part of them is not what the specification has."""
    number = choices.number()
    request = choices.number(4) if number == 255 else number % 48
    flags = choices.pick((1, 1, 1, 9, 9, 9, 5, 0, 13, choices.number()))
    if choices.number() % 8 == 7:
        payload = choices.take(choices.number())
    elif request in PAYLOADS:
        payload = PAYLOADS[request](choices)
    else:
        payload = b"" if request in ALONE else bytes(choices.pick((0, 8, 16, 40)))
    said = choices.pick((len(payload),) * 12 + (len(payload) + 1, max(0, len(payload) - 1), 4096, 4097, 2**32 - 1))
    return request, pack("=III", request, flags, said) + payload


def good(request: int, payload: bytes = b"", *, need_reply: bool = False) -> bytes:
    """A message that is right."""
    return pack("=III", request, 9 if need_reply else 1, len(payload)) + payload
