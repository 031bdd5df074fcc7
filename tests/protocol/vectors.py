"""Every message with its bytes, written by hand from the tables of the vhost-user specification (Message payload).

The hexadecimal is in wire order for a little-endian host, field by field; it was not produced by the code under test.
Captured streams would name peer, version and command; there are none here.
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from vhostuser.protocol import (
    U64,
    BackendRequest,
    Config,
    DeviceStateParams,
    DeviceStateReply,
    FrontendRequest,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    Nothing,
    Payload,
    Raw,
    SharedObject,
    ShmemConfig,
    ShmemMmap,
    SingleRegion,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
)

assert sys.byteorder == "little", "these bytes are those of a little-endian host"

Req = FrontendRequest


@dataclass(frozen=True)
class Vector:
    """One request with its payload, and its own reply if it has one."""

    request: int
    wire: str
    payload: Payload
    text: str
    fds: tuple[str, ...] = ()
    reply_wire: str | None = None
    reply: Payload | None = None
    reply_text: str = ""
    reply_fds: tuple[str, ...] = ()

    @property
    def data(self) -> bytes:
        return bytes.fromhex(self.wire)

    @property
    def reply_data(self) -> bytes:
        return bytes.fromhex(self.reply_wire or "")


FEATURES = "40020070 01000000"  # BLK_SIZE 6, FLUSH 9, INDIRECT_DESC 28, EVENT_IDX 29, 30, VERSION_1 32
FEATURES_VALUE = 0x1_7000_0240
STATE_2_7 = "02000000 07000000"
STATE_2_0 = "02000000 00000000"
STATE_2_1 = "02000000 01000000"
OK = "00000000 00000000"
REGION_0 = "0000000000000000 0000008000000000 000000b0ff7f0000 0000000000000000"
REGION_1 = "0000000001000000 0010000000000000 000000c0ff7f0000 0020000000000000"
R0 = MemoryRegion(0, 0x8000_0000, 0x7FFF_B000_0000, 0)
R1 = MemoryRegion(0x1_0000_0000, 0x1000, 0x7FFF_C000_0000, 0x2000)
R1_TEXT = "[guest_addr=0x100000000 size=0x1000 user_addr=0x7fffc0000000 mmap_offset=0x2000]"
INFLIGHT = "0008000000000000 0000000000000000 0200 8000 00000000"
INFLIGHT_TEXT = "mmap_size=0x800 mmap_offset=0x0 num_queues=2 queue_size=128"
UUID_WIRE = "00112233 4455 6677 8899 aabbccddeeff"
UUID_BYTES = bytes(range(0x00, 0x100, 0x11))
UUID_TEXT = "uuid=00112233-4455-6677-8899-aabbccddeeff"
ZERO = U64(0)

FRONTEND_VECTORS: tuple[Vector, ...] = (
    Vector(
        Req.GET_FEATURES, "", Nothing(), "GET_FEATURES", (), FEATURES, U64(FEATURES_VALUE),
        "reply GET_FEATURES 0x170000240 (bit 6 bit 9 INDIRECT_DESC EVENT_IDX PROTOCOL_FEATURES VERSION_1)",
    ),
    Vector(
        Req.SET_FEATURES, "00000050 01000000", U64(0x1_5000_0000),
        "SET_FEATURES 0x150000000 (INDIRECT_DESC PROTOCOL_FEATURES VERSION_1)",
    ),
    Vector(Req.SET_OWNER, "", Nothing(), "SET_OWNER"),
    Vector(Req.RESET_OWNER, "", Nothing(), "RESET_OWNER"),
    Vector(
        Req.SET_MEM_TABLE, f"02000000 00000000 {REGION_0} {REGION_1}", MemoryTable((R0, R1)),
        "SET_MEM_TABLE 2 regions [guest_addr=0x0 size=0x80000000 user_addr=0x7fffb0000000 mmap_offset=0x0] "
        f"{R1_TEXT} 2 fds",
        ("low", "high"),
    ),
    Vector(
        Req.SET_LOG_BASE, "0000100000000000 0010000000000000", Log(0x10_0000, 0x1000),
        "SET_LOG_BASE mmap_size=0x100000 mmap_offset=0x1000 1 fd", ("log",),
        "0000100000000000 0010000000000000", Log(0x10_0000, 0x1000),
        "reply SET_LOG_BASE mmap_size=0x100000 mmap_offset=0x1000",
    ),
    Vector(Req.SET_LOG_FD, "", Nothing(), "SET_LOG_FD 1 fd", ("event",)),
    Vector(Req.SET_VRING_NUM, STATE_2_7, VringState(2, 7), "SET_VRING_NUM index=2 num=7"),
    Vector(
        Req.SET_VRING_ADDR,
        "01000000 01000000 0010000000000000 0020000000000000 0030000000000000 0040000000000000",
        VringAddr(1, 1, 0x1000, 0x2000, 0x3000, 0x4000),
        "SET_VRING_ADDR index=1 flags=LOG descriptor=0x1000 used=0x2000 available=0x3000 log=0x4000",
    ),
    Vector(Req.SET_VRING_BASE, "02000000 ff000000", VringState(2, 0xFF), "SET_VRING_BASE index=2 num=255"),
    Vector(
        Req.GET_VRING_BASE, STATE_2_0, VringState(2, 0), "GET_VRING_BASE index=2 num=0", (),
        STATE_2_7, VringState(2, 7), "reply GET_VRING_BASE index=2 num=7",
    ),
    Vector(Req.SET_VRING_KICK, "0300000000000000", VringFd(3), "SET_VRING_KICK index=3 1 fd", ("kick",)),
    Vector(Req.SET_VRING_CALL, "0301000000000000", VringFd(0x103), "SET_VRING_CALL index=3 no_fd"),
    Vector(Req.SET_VRING_ERR, "ff00000000000000", VringFd(0xFF), "SET_VRING_ERR index=255 1 fd", ("err",)),
    Vector(
        Req.GET_PROTOCOL_FEATURES, "", Nothing(), "GET_PROTOCOL_FEATURES", (),
        "0902000000000000", U64(0x209), "reply GET_PROTOCOL_FEATURES 0x209 (MQ REPLY_ACK CONFIG)",
    ),
    Vector(
        Req.SET_PROTOCOL_FEATURES, "0902000000000000", U64(0x209), "SET_PROTOCOL_FEATURES 0x209 (MQ REPLY_ACK CONFIG)"
    ),
    Vector(
        Req.GET_QUEUE_NUM, "", Nothing(), "GET_QUEUE_NUM", (), "1000000000000000", U64(16), "reply GET_QUEUE_NUM 16"
    ),
    Vector(Req.SET_VRING_ENABLE, STATE_2_1, VringState(2, 1), "SET_VRING_ENABLE index=2 num=1"),
    Vector(Req.SEND_RARP, "525400123456 0000", U64(0x5634_1200_5452), "SEND_RARP mac=52:54:00:12:34:56"),
    Vector(Req.NET_SET_MTU, "dc05000000000000", U64(1500), "NET_SET_MTU 1500"),
    Vector(Req.SET_BACKEND_REQ_FD, "", Nothing(), "SET_BACKEND_REQ_FD 1 fd", ("channel",)),
    Vector(
        Req.IOTLB_MSG, "0000010000000000 0010000000000000 000000b0ff7f0000 03 02 000000000000",
        Iotlb(0x1_0000, 0x1000, 0x7FFF_B000_0000, 3, 2),
        "IOTLB_MSG iova=0x10000 size=0x1000 uaddr=0x7fffb0000000 perm=READ|WRITE type=UPDATE", (),
        OK, ZERO, "reply IOTLB_MSG ok",
    ),
    Vector(Req.SET_VRING_ENDIAN, STATE_2_1, VringState(2, 1), "SET_VRING_ENDIAN index=2 num=1"),
    Vector(
        Req.GET_CONFIG, "08000000 04000000 00000000 00000000", Config(8, 4, 0, bytes(4)),
        "GET_CONFIG offset=8 size=4 flags=0x0 data=00000000", (),
        "08000000 04000000 00000000 01020304", Config(8, 4, 0, b"\1\2\3\4"),
        "reply GET_CONFIG offset=8 size=4 flags=0x0 data=01020304",
    ),
    Vector(
        Req.SET_CONFIG, "20000000 01000000 00000000 01", Config(32, 1, 0, b"\1"),
        "SET_CONFIG offset=32 size=1 flags=0x0 data=01",
    ),
    Vector(
        Req.CREATE_CRYPTO_SESSION, "c0ffee", Raw(b"\xc0\xff\xee"), "CREATE_CRYPTO_SESSION 3 bytes data=c0ffee", (),
        "c0ffef", Raw(b"\xc0\xff\xef"), "reply CREATE_CRYPTO_SESSION 3 bytes data=c0ffef",
    ),
    Vector(Req.CLOSE_CRYPTO_SESSION, "0100000000000000", U64(1), "CLOSE_CRYPTO_SESSION 0x1"),
    Vector(
        Req.POSTCOPY_ADVISE, "", Nothing(), "POSTCOPY_ADVISE", (),
        "", Nothing(), "reply POSTCOPY_ADVISE 1 fd", ("uffd",),
    ),
    Vector(Req.POSTCOPY_LISTEN, "", Nothing(), "POSTCOPY_LISTEN"),
    Vector(Req.POSTCOPY_END, "", Nothing(), "POSTCOPY_END", (), OK, ZERO, "reply POSTCOPY_END ok"),
    Vector(
        Req.GET_INFLIGHT_FD, "0000000000000000 0000000000000000 0200 8000 00000000", Inflight(0, 0, 2, 128),
        "GET_INFLIGHT_FD mmap_size=0x0 mmap_offset=0x0 num_queues=2 queue_size=128", (),
        INFLIGHT, Inflight(0x800, 0, 2, 128), f"reply GET_INFLIGHT_FD {INFLIGHT_TEXT} 1 fd", ("region",),
    ),
    Vector(
        Req.SET_INFLIGHT_FD, INFLIGHT, Inflight(0x800, 0, 2, 128), f"SET_INFLIGHT_FD {INFLIGHT_TEXT} 1 fd", ("region",)
    ),
    Vector(Req.GPU_SET_SOCKET, "", Nothing(), "GPU_SET_SOCKET 1 fd", ("gpu",)),
    Vector(Req.RESET_DEVICE, "", Nothing(), "RESET_DEVICE"),
    Vector(Req.VRING_KICK, STATE_2_0, VringState(2, 0), "VRING_KICK index=2 num=0"),
    Vector(
        Req.GET_MAX_MEM_SLOTS, "", Nothing(), "GET_MAX_MEM_SLOTS", (),
        "fd01000000000000", U64(509), "reply GET_MAX_MEM_SLOTS 509",
    ),
    Vector(
        Req.ADD_MEM_REG, f"0000000000000000 {REGION_1}", SingleRegion(R1), f"ADD_MEM_REG {R1_TEXT} 1 fd", ("memory",)
    ),
    Vector(Req.REM_MEM_REG, f"0000000000000000 {REGION_1}", SingleRegion(R1), f"REM_MEM_REG {R1_TEXT}"),
    Vector(
        Req.SET_STATUS, "0f00000000000000", U64(15), "SET_STATUS 0xf (ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK)"
    ),
    Vector(
        Req.GET_STATUS, "", Nothing(), "GET_STATUS", (),
        "4100000000000000", U64(0x41), "reply GET_STATUS 0x41 (ACKNOWLEDGE|DEVICE_NEEDS_RESET)",
    ),
    Vector(
        Req.GET_SHARED_OBJECT, UUID_WIRE, SharedObject(UUID_BYTES), f"GET_SHARED_OBJECT {UUID_TEXT}", (),
        "", Nothing(), "reply GET_SHARED_OBJECT 1 fd", ("dmabuf",),
    ),
    Vector(
        Req.SET_DEVICE_STATE_FD, "01000000 00000000", DeviceStateParams(1, 0),
        "SET_DEVICE_STATE_FD direction=LOAD phase=STOPPED 1 fd", ("state",),
        "0001000000000000", DeviceStateReply(0x100), "reply SET_DEVICE_STATE_FD ok no_fd",
    ),
    Vector(
        Req.CHECK_DEVICE_STATE, "", Nothing(), "CHECK_DEVICE_STATE", (),
        "0500000000000000", U64(5), "reply CHECK_DEVICE_STATE failed with 5",
    ),
    Vector(
        Req.GET_SHMEM_CONFIG, "", Nothing(), "GET_SHMEM_CONFIG", (),
        f"02000000 00000000 0010000000000000 {OK} 0000200000000000 {OK * 253}",
        ShmemConfig(2, (0x1000, 0, 0x20_0000) + (0,) * 253),
        "reply GET_SHMEM_CONFIG nregions=2 0:0x1000 2:0x200000",
    ),
    Vector(
        Req.GET_VRING_BASE_SKIP_DRAIN, STATE_2_0, VringState(2, 0), "GET_VRING_BASE_SKIP_DRAIN index=2 num=0", (),
        STATE_2_7, VringState(2, 7), "reply GET_VRING_BASE_SKIP_DRAIN index=2 num=7",
    ),
)  # fmt: skip

MMAP = "03 00000000000000 0010000000000000 0020000000000000 0030000000000000 0100000000000000"
MMAP_VALUE = ShmemMmap(3, 0x1000, 0x2000, 0x3000, 1)
MMAP_TEXT = "shmid=3 fd_offset=0x1000 shm_offset=0x2000 len=0x3000 flags=WRITABLE"

BACKEND_VECTORS: tuple[Vector, ...] = (
    Vector(
        BackendRequest.IOTLB_MSG, f"0000010000000000 {OK} {OK} 01 01 000000000000", Iotlb(0x1_0000, 0, 0, 1, 1),
        "BACKEND_IOTLB_MSG iova=0x10000 size=0x0 uaddr=0x0 perm=READ type=MISS",
    ),
    Vector(BackendRequest.CONFIG_CHANGE_MSG, "", Nothing(), "BACKEND_CONFIG_CHANGE_MSG"),
    Vector(
        BackendRequest.VRING_HOST_NOTIFIER_MSG, f"0200000000000000 0010000000000000 {OK}", VringArea(2, 0x1000, 0),
        "BACKEND_VRING_HOST_NOTIFIER_MSG index=2 size=0x1000 offset=0x0 1 fd", ("page",),
    ),
    Vector(BackendRequest.VRING_CALL, STATE_2_0, VringState(2, 0), "BACKEND_VRING_CALL index=2 num=0"),
    Vector(BackendRequest.VRING_ERR, STATE_2_0, VringState(2, 0), "BACKEND_VRING_ERR index=2 num=0"),
    Vector(
        BackendRequest.SHARED_OBJECT_ADD, UUID_WIRE, SharedObject(UUID_BYTES), f"BACKEND_SHARED_OBJECT_ADD {UUID_TEXT}"
    ),
    Vector(
        BackendRequest.SHARED_OBJECT_REMOVE, UUID_WIRE, SharedObject(UUID_BYTES),
        f"BACKEND_SHARED_OBJECT_REMOVE {UUID_TEXT}",
    ),
    Vector(
        BackendRequest.SHARED_OBJECT_LOOKUP, UUID_WIRE, SharedObject(UUID_BYTES),
        f"BACKEND_SHARED_OBJECT_LOOKUP {UUID_TEXT}", (),
        OK, ZERO, "reply BACKEND_SHARED_OBJECT_LOOKUP ok 1 fd", ("dmabuf",),
    ),
    Vector(BackendRequest.SHMEM_MAP, MMAP, MMAP_VALUE, f"BACKEND_SHMEM_MAP {MMAP_TEXT} 1 fd", ("file",)),
    Vector(BackendRequest.SHMEM_UNMAP, MMAP, MMAP_VALUE, f"BACKEND_SHMEM_UNMAP {MMAP_TEXT}"),
)  # fmt: skip


def proving(vectors: tuple[Vector, ...]) -> list[object]:
    """Parameters of a test that proves those rows of the conformance table which claim no more than "decoded"."""
    claims: dict[str, str] = {}
    conformance = Path(__file__).parents[2] / "docs" / "conformance.toml"
    for table in tomllib.loads(conformance.read_text())["table"]:
        for row, claim in table["rows"].items():
            claims[table["prefix"] + row] = claim if isinstance(claim, str) else claim[0]
    parameters: list[object] = []
    for vector in vectors:
        prefix = "VHOST_USER_BACKEND_" if isinstance(vector.request, BackendRequest) else "VHOST_USER_"
        row = prefix + getattr(vector.request, "name", "")
        marks = [pytest.mark.covers(row)] if claims[row] == "decoded" else []
        parameters.append(pytest.param(vector, marks=marks, id=row))
    return parameters
