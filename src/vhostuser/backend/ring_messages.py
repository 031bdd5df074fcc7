"""What each message about rings, memory and the dirty log asks of the rings. Touches the native queues through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostuser._native import DirtyLog, GuestMemory
from vhostuser.errors import GuestMemoryError, SetupError
from vhostuser.protocol import (
    U64,
    FrontendRequest,
    Log,
    MemoryRegion,
    MemoryTable,
    Message,
    Payload,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)

if TYPE_CHECKING:
    from vhostuser.backend.vrings import Vrings
    from vhostuser.fds import Fd

Req = FrontendRequest

MAX_MEM_SLOTS = 509
"""As many regions as vhost in the kernel offers; QEMU takes up to 512 and the number may never shrink."""


def obey_ring_message(rings: Vrings, message: Message[Fd]) -> Payload | None:
    """Do what ``message`` says and return its own reply, or None where an acknowledgement is all there is.

    Its descriptors stay the caller's. Raises `SetupError` for what no ring does, and what ``rings`` raises.
    """
    match message:
        case Message(Req.SET_MEM_TABLE, MemoryTable(regions), fds):
            rings.set_memory(GuestMemory([_region(*pair) for pair in zip(regions, fds, strict=True)]))
        case Message(Req.GET_MAX_MEM_SLOTS):
            return U64(MAX_MEM_SLOTS)
        case Message(Req.ADD_MEM_REG, SingleRegion(region), (fd,)):
            if len(rings.memory.regions) >= MAX_MEM_SLOTS:
                raise GuestMemoryError(f"there are {MAX_MEM_SLOTS} regions already")
            rings.set_memory(rings.memory.add(_region(region, fd)))
        case Message(Req.REM_MEM_REG, SingleRegion(region)):
            rings.set_memory(rings.memory.remove(region.guest_addr, region.size, region.user_addr))
        case Message(Req.SET_LOG_BASE, Log(size, offset) as told, (fd,)):
            rings.set_log(DirtyLog(fd.fileno(), offset=offset, size=size))
            return told
        case Message(Req.SET_LOG_FD, _, (fd,)):
            rings.set_log_fd(fd)
        case Message(Req.SET_VRING_NUM, VringState(index, num)):
            rings.set_num(index, num)
        case Message(Req.SET_VRING_BASE, VringState(index, num)):
            rings.set_base(index, num)
        case Message(Req.SET_VRING_ADDR, VringAddr(index) as addr):
            rings.set_addr(index, addr)
        case Message(Req.SET_VRING_KICK, VringFd() as ring, fds):
            rings.set_kick(ring.index, fds[0] if fds else None)
        case Message(Req.SET_VRING_CALL, VringFd() as ring, fds):
            rings.set_call(ring.index, fds[0] if fds else None)
        case Message(Req.SET_VRING_ERR, VringFd() as ring, fds):
            rings.set_err(ring.index, fds[0] if fds else None)
        case Message(Req.SET_VRING_ENABLE, VringState(index, num)):
            rings.set_enable(index, bool(num))
        case Message(Req.GET_VRING_BASE, VringState(index)):
            return VringState(index, rings.get_base(index))
        case _:
            raise SetupError("this device does not do that")
    return None


def _region(region: MemoryRegion, fd: Fd) -> tuple[int, int, int, int, int]:
    return region.guest_addr, region.size, region.user_addr, region.mmap_offset, fd.fileno()
