"""A disk in the memory of this process; its content ends with it. Touches `_native`."""

from __future__ import annotations

from vhostuser._native import EngineSpec
from vhostuser.disks.disk import SECTOR, Capability, Limits, NativeDisk
from vhostuser.errors import UsageError


class MemoryDisk(NativeDisk):
    """``size`` bytes of zeroes; memory is taken as it is written and given back when it is discarded."""

    capabilities = (
        Capability.WRITE | Capability.FLUSH | Capability.DISCARD | Capability.WRITE_ZEROES | Capability.RESIZE
    )

    volatile = True

    def __init__(self, size: int, *, read_only: bool = False) -> None:
        """Raises `UsageError` for a size below one sector, `OSError` when there is no address space for it."""
        self._size = _checked("memory", size)
        self._engine = EngineSpec.memory(self._size)
        if read_only:
            self.capabilities = Capability.FLUSH | Capability.RESIZE

    @property
    def name(self) -> str:
        """How this disk is written on a command line."""
        return f"memory:size={self._size}"

    @property
    def limits(self) -> Limits:
        """Any sector may be written; pages of 4096 bytes are given back."""
        return Limits(size=self._size, physical_block_size=4096, discard_alignment=4096, write_zeroes_may_unmap=True)

    def engine(self) -> EngineSpec:
        """The memory engine."""
        return self._engine

    def resize(self, size: int) -> None:
        """Make room for ``size`` bytes; what is cut off reads as zeroes when it is grown again."""
        self._engine.resize(_checked(self.name, size))
        self._size = size


def _checked(subject: str, size: int) -> int:
    if size < SECTOR:
        raise UsageError(subject, f"{size} bytes are less than one sector", f"Give it {SECTOR} bytes or more")
    return size
