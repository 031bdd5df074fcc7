"""Payloads of vhost-user messages: one frozen dataclass per layout (vhost-user: Message payload). Touches nothing.

Fields are in wire order and native byte order. ``pack`` and ``unpack`` raise `Violation` and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import ClassVar, Final, Self

from vhostuser.protocol.ids import MAX_PAYLOAD
from vhostuser.protocol.layout import Fixed, Payload, Violation


@dataclass(frozen=True, slots=True)
class Nothing(Fixed):
    """No payload at all."""

    LAYOUT: ClassVar[Struct] = Struct("=")


@dataclass(frozen=True, slots=True)
class U64(Fixed):
    """A single integer (vhost-user: A single 64-bit integer)."""

    LAYOUT: ClassVar[Struct] = Struct("=Q")

    value: int


@dataclass(frozen=True, slots=True)
class VringState(Fixed):
    """A number about one ring (vhost-user: A vring state description)."""

    LAYOUT: ClassVar[Struct] = Struct("=II")

    index: int
    num: int


class VringFlag(IntFlag):
    """Flags of `VringAddr`."""

    LOG = 1 << 0


@dataclass(frozen=True, slots=True)
class VringAddr(Fixed):
    """Where one ring lives (vhost-user: A vring address description)."""

    LAYOUT: ClassVar[Struct] = Struct("=IIQQQQ")

    index: int
    flags: int  # VringFlag
    descriptor: int  # uva; iova once VIRTIO_F_ACCESS_PLATFORM is negotiated
    used: int  # likewise
    available: int  # likewise
    log: int  # gpa

    @property
    def log_used(self) -> int | None:
        """The guest address under which the used ring is noted; None when it is not."""
        return self.log if self.flags & VringFlag.LOG else None


NO_FD: Final = 1 << 8


@dataclass(frozen=True, slots=True)
class VringFd(Fixed):
    """Which ring a descriptor is for, and whether one is attached (vhost-user: VHOST_USER_SET_VRING_KICK)."""

    LAYOUT: ClassVar[Struct] = Struct("=Q")

    value: int

    @classmethod
    def of(cls, index: int, *, no_fd: bool = False) -> Self:
        """Build it for ring ``index``, 0..255. Raises `Violation` for another."""
        if not 0 <= index <= 0xFF:
            raise Violation(f"{cls.__name__} names rings 0 to 255, not {index}")
        return cls(index | (NO_FD if no_fd else 0))

    @property
    def index(self) -> int:
        """The ring, 0..255."""
        return self.value & 0xFF

    @property
    def no_fd(self) -> bool:
        """True when the message says that no descriptor comes with it."""
        return bool(self.value & NO_FD)


@dataclass(frozen=True, slots=True)
class MemoryRegion(Fixed):
    """A piece of guest memory (vhost-user: Memory region description). Not a payload by itself."""

    LAYOUT: ClassVar[Struct] = Struct("=QQQQ")

    guest_addr: int  # gpa
    size: int
    user_addr: int  # uva; equals guest_addr with GPA_ADDRESSES
    mmap_offset: int


class XenFlag(IntFlag):
    """Flags of `XenMemoryRegion`."""

    FOREIGN = 1 << 0
    GRANT = 1 << 1
    NO_ADVANCE_MAP = 1 << 8


@dataclass(frozen=True, slots=True)
class XenMemoryRegion(MemoryRegion):
    """A memory region once XEN_MMAP is negotiated."""

    LAYOUT: ClassVar[Struct] = Struct("=QQQQII")

    xen_flags: int  # XenFlag
    domid: int


@dataclass(frozen=True, slots=True)
class MemoryTable(Payload):
    """All of guest memory (vhost-user: Multiple memory regions description)."""

    HEAD: ClassVar[Struct] = Struct("=II")  # the second field is padding
    REGION: ClassVar[type[MemoryRegion]] = MemoryRegion

    regions: tuple[MemoryRegion, ...]

    def pack(self) -> bytes:
        for region in self.regions:
            if type(region) is not self.REGION:
                raise Violation(f"{type(self).__name__} holds {self.REGION.__name__}, not {type(region).__name__}")
        return self.HEAD.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Bytes after the last region are ignored: UML sends room for more regions than it counts."""
        if len(payload) < cls.HEAD.size:
            raise Violation(f"{cls.__name__} is at least {cls.HEAD.size} bytes, not {len(payload)}")
        count, _ = cls.HEAD.unpack_from(payload)
        step, start = cls.REGION.LAYOUT.size, cls.HEAD.size
        if len(payload) < start + count * step:
            raise Violation(f"{cls.__name__} of {count} regions does not fit in {len(payload)} bytes")
        at = range(start, start + count * step, step)
        return cls(tuple(cls.REGION.unpack(payload[offset : offset + step]) for offset in at))


@dataclass(frozen=True, slots=True)
class XenMemoryTable(MemoryTable):
    """A memory table once XEN_MMAP is negotiated."""

    REGION: ClassVar[type[MemoryRegion]] = XenMemoryRegion


@dataclass(frozen=True, slots=True)
class SingleRegion(Payload):
    """One region to add or remove (vhost-user: Single memory region description)."""

    REGION: ClassVar[type[MemoryRegion]] = MemoryRegion

    region: MemoryRegion

    def pack(self) -> bytes:
        if type(self.region) is not self.REGION:
            raise Violation(f"{type(self).__name__} holds {self.REGION.__name__}, not {type(self.region).__name__}")
        return bytes(8) + self.region.pack()

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) != 8 + cls.REGION.LAYOUT.size:
            raise Violation(f"{cls.__name__} is {8 + cls.REGION.LAYOUT.size} bytes, not {len(payload)}")
        return cls(cls.REGION.unpack(payload[8:]))


@dataclass(frozen=True, slots=True)
class XenSingleRegion(SingleRegion):
    """A single region once XEN_MMAP is negotiated."""

    REGION: ClassVar[type[MemoryRegion]] = XenMemoryRegion


@dataclass(frozen=True, slots=True)
class Log(Fixed):
    """Where the dirty log is in its file (vhost-user: Log description)."""

    LAYOUT: ClassVar[Struct] = Struct("=QQ")

    mmap_size: int
    mmap_offset: int


class IotlbPerm(IntFlag):
    """Access of `Iotlb`."""

    READ = 1
    WRITE = 2


class IotlbType(IntEnum):
    """What an `Iotlb` says; UPDATE and INVALIDATE come from the front-end, the others from the back-end."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


@dataclass(frozen=True, slots=True)
class Iotlb(Fixed):
    """A translation, or the lack of one (vhost-user: An IOTLB message)."""

    LAYOUT: ClassVar[Struct] = Struct("=QQQBB6x")
    USEFUL: ClassVar[int] = 26

    iova: int
    size: int
    uaddr: int  # uva; gpa from the front-end with GPA_ADDRESSES
    perm: int  # IotlbPerm
    type: int  # IotlbType


@dataclass(frozen=True, slots=True)
class Config(Payload):
    """A piece of the device configuration space (vhost-user: Virtio device config space)."""

    HEAD: ClassVar[Struct] = Struct("=III")
    MAX_SIZE: ClassVar[int] = MAX_PAYLOAD - 12

    offset: int
    size: int
    flags: int  # 0 writable, 1 migration; rust-vmm and its users say 1 writable, 2 migration
    data: bytes

    def pack(self) -> bytes:
        if len(self.data) != self.size:
            raise Violation(f"Config of size {self.size} carries {len(self.data)} bytes")
        try:
            return self.HEAD.pack(self.offset, self.size, self.flags) + self.data
        except struct.error as error:
            raise Violation(f"Config: {error}") from error

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Bytes after ``size`` are ignored: SPDK always sends 268."""
        if len(payload) < cls.HEAD.size:
            raise Violation(f"Config is at least {cls.HEAD.size} bytes, not {len(payload)}")
        offset, size, flags = cls.HEAD.unpack_from(payload)
        if len(payload) < cls.HEAD.size + size:
            raise Violation(f"Config of size {size} does not fit in {len(payload)} bytes")
        return cls(offset, size, flags, payload[cls.HEAD.size : cls.HEAD.size + size])


@dataclass(frozen=True, slots=True)
class VringArea(Fixed):
    """A page to notify a ring through (vhost-user: VhostUserVringArea)."""

    LAYOUT: ClassVar[Struct] = Struct("=QQQ")

    value: int  # index and no_fd, as in VringFd
    size: int
    offset: int

    @property
    def index(self) -> int:
        """The ring, 0..255."""
        return self.value & 0xFF

    @property
    def no_fd(self) -> bool:
        """True when the message says that no descriptor comes with it."""
        return bool(self.value & NO_FD)


@dataclass(frozen=True, slots=True)
class Inflight(Fixed):
    """The shared memory of in-flight tracking (vhost-user: Inflight description)."""

    LAYOUT: ClassVar[Struct] = Struct("=QQHH4x")
    USEFUL: ClassVar[int] = 20

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class SharedObject(Fixed):
    """The name of a shared object (vhost-user: VhostUserShared)."""

    LAYOUT: ClassVar[Struct] = Struct("=16s")

    uuid: bytes  # 16 bytes, the first three components big-endian: as in uuid.UUID.bytes

    def pack(self) -> bytes:
        if len(self.uuid) != 16:
            raise Violation(f"SharedObject has a UUID of 16 bytes, not {len(self.uuid)}")
        return Fixed.pack(self)


class ShmemFlag(IntFlag):
    """Flags of `ShmemMmap`."""

    WRITABLE = 1 << 0


@dataclass(frozen=True, slots=True)
class ShmemMmap(Fixed):
    """A mapping in a shared memory region (vhost-user: VIRTIO Shared Memory Region mapping)."""

    LAYOUT: ClassVar[Struct] = Struct("=B7xQQQQ")

    shmid: int
    fd_offset: int
    shm_offset: int
    len: int
    flags: int  # ShmemFlag


@dataclass(frozen=True, slots=True)
class ShmemConfig(Payload):
    """The sizes of the shared memory regions (vhost-user: VIRTIO Shared Memory Region configuration).

    ``sizes`` has 256 entries in bytes, indexed by shmid; 0 where there is no region.
    """

    LAYOUT: ClassVar[Struct] = Struct("=I4x256Q")

    nregions: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, sizes: tuple[int, ...]) -> Self:
        """Build it from the first sizes; the regions after them do not exist."""
        return cls(sum(size != 0 for size in sizes), sizes + (0,) * (256 - len(sizes)))

    def pack(self) -> bytes:
        try:
            return self.LAYOUT.pack(self.nregions, *self.sizes)
        except struct.error as error:
            raise Violation(f"ShmemConfig: {error}") from error

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) != cls.LAYOUT.size:
            raise Violation(f"ShmemConfig is {cls.LAYOUT.size} bytes, not {len(payload)}")
        nregions, *sizes = cls.LAYOUT.unpack(payload)
        return cls(nregions, tuple(sizes))


@dataclass(frozen=True, slots=True)
class Raw(Payload):
    """Bytes whose layout is not known here: the crypto session, and every request this package does not know."""

    data: bytes

    def pack(self) -> bytes:
        return self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        return cls(payload)
