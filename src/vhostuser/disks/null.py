"""A disk that stores nothing, for measuring everything else. Touches `_native`."""

from __future__ import annotations

from vhostuser._native import EngineSpec
from vhostuser.disks.disk import SECTOR, Capability, Limits, NativeDisk
from vhostuser.errors import UsageError


class NullDisk(NativeDisk):
    """``size`` bytes that take every write and leave the buffers of every read as they are."""

    capabilities = (
        Capability.WRITE | Capability.FLUSH | Capability.DISCARD | Capability.WRITE_ZEROES | Capability.RESIZE
    )

    def __init__(self, size: int, *, read_only: bool = False) -> None:
        """Raises `UsageError` for a size below one sector."""
        self._engine = EngineSpec.null()
        self._size = 0
        self.resize(size)
        if read_only:
            self.capabilities = Capability.FLUSH | Capability.RESIZE

    @property
    def name(self) -> str:
        """How this disk is written on a command line."""
        return f"null:size={self._size}"

    @property
    def limits(self) -> Limits:
        """No limits but the size."""
        return Limits(size=self._size, write_zeroes_may_unmap=True)

    def engine(self) -> EngineSpec:
        """The null engine."""
        return self._engine

    def resize(self, size: int) -> None:
        """Pretend to have ``size`` bytes."""
        if size < SECTOR:
            raise UsageError("null", f"{size} bytes are less than one sector", f"Give it {SECTOR} bytes or more")
        self._size = size
