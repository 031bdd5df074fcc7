"""What a disk is: its limits, its abilities, and where its bytes are. Touches nothing."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Flag, auto
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vhostuser.disks.custody import Holding, Takeover
from vhostuser.errors import UsageError

if TYPE_CHECKING:
    from vhostuser._native import EngineSpec

SECTOR = 512
"""The unit of every virtio-blk request, in bytes, whatever the block size."""

MAX_SEGMENT = 1 << 31
"""The longest discard or zero segment we offer, in bytes: one such request must not occupy storage for long."""

MAX_SEGMENTS = 16
"""The most discard or zero segments we offer per request."""


class Capability(Flag):
    """What a disk can do besides being read."""

    NONE = 0
    WRITE = auto()
    FLUSH = auto()
    DISCARD = auto()
    WRITE_ZEROES = auto()
    RESIZE = auto()
    """`Disk.resize` changes the storage; without it only `Disk.refresh` may find another size."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The shape of a disk. Every quantity is in bytes."""

    size: int
    block_size: int = SECTOR
    """The smallest logical block that storage allows: requests are multiples of it."""
    physical_block_size: int = SECTOR
    """The smallest block that storage writes without reading first."""
    min_io_size: int = 0
    """The smallest request that does not cost extra; 0 when unknown."""
    opt_io_size: int = 0
    """The best size for streaming; 0 when unknown."""
    discard_alignment: int = SECTOR
    """Storage gives space back only in pieces of this size and alignment."""
    max_discard: int = MAX_SEGMENT
    """The longest discard segment."""
    max_write_zeroes: int = MAX_SEGMENT
    """The longest zero segment."""
    max_segments: int = MAX_SEGMENTS
    """Segments per discard or zero request."""
    write_zeroes_may_unmap: bool = False
    """Zeroing with the unmap flag may give space back."""


class Disk(ABC):
    """Storage behind a virtual disk; knows nothing of vhost.

    A disk either names a native engine, which then moves every byte, or is read and written through the methods below.
    The methods may be called from several threads, at most `concurrency` of them at a time. They raise `OSError` with
    an errno, which becomes the status of the request.
    """

    capabilities: Capability = Capability.WRITE | Capability.FLUSH
    concurrency: int = 1
    writeback: bool = True
    """Whether the guest finds its write cache on at first."""
    volatile: bool = False
    """Whether the content ends with this process."""
    fenced: bool = True
    """Whether nobody can open the storage like this before the last request of the one before has ended, even of a
    process that was killed."""

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """The limits as they are now; only ``size`` changes during the life of a disk."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What a person calls this disk, for messages: a path, or the text it was opened by."""

    def engine(self) -> EngineSpec | None:
        """The native engine that serves this disk, always the same one; None when its own methods serve it."""
        return None

    @abstractmethod
    def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes at ``offset``."""

    def write(self, offset: int, data: memoryview) -> None:
        """Store ``data`` at ``offset``."""
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def flush(self) -> None:  # noqa: B027  a disk may have nothing to do
        """Return once everything written before is on stable storage. May block."""

    def discard(self, offset: int, length: int) -> None:  # noqa: B027
        """Forget ``length`` bytes at ``offset``; what they read as afterwards is not defined."""

    def refresh(self) -> int:
        """Look at the storage again and return its size in bytes, which may have changed. May block."""
        return self.limits.size

    @property
    def holding(self) -> Holding:
        """Whose the storage is, while one server hands it over to another. Any thread."""
        return Holding.HELD

    def activate(self) -> Takeover | None:
        """Have the storage before it is used: called before the first ring of a device starts.

        Returns what is known of the server that had it meanwhile; None when nobody had. May block for the time that
        the disk was given to wait for it. Raises `OperatorError` when it is not to be had.
        """
        return None

    def deactivate(self, *, unused: bool = False) -> None:  # noqa: B027
        """The storage is not used until `activate`: every ring has stopped and every request has ended. May block.

        ``unused``: nothing was read or written since the last `activate`, which is to be undone.
        """

    def look_for_heir(self) -> bool:
        """Let go of the storage if it is not used and another server has begun to wait for it. Any thread.

        Returns whether it is worth looking again after a while: nothing tells us when one begins.
        """
        return False

    def note_write_cache(self, *, on: bool) -> None:  # noqa: B027
        """Keep for the next server whether the guest has its write cache on."""

    def resize(self, size: int) -> None:
        """Change the storage to ``size`` bytes. Raises `UsageError` when this kind of disk cannot. May block."""
        raise UsageError(self.name, "this kind of disk cannot be resized", "Serve a file or a memory disk")

    def close(self) -> None:  # noqa: B027
        """Let go of the storage. Idempotent; a lock on it ends when the last request in flight has ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class NativeDisk(Disk):
    """A disk whose bytes are moved by its native engine alone and never pass through Python."""

    @abstractmethod
    def engine(self) -> EngineSpec:
        """The native engine that serves this disk, always the same one."""

    def read(self, offset: int, into: memoryview) -> None:
        """Raises `OSError` (EOPNOTSUPP): only the engine reads this disk."""
        raise OSError(errno.EOPNOTSUPP, f"{self.name} is read by its native engine only")

    def write(self, offset: int, data: memoryview) -> None:
        """Raises `OSError` (EOPNOTSUPP): only the engine writes this disk."""
        raise OSError(errno.EOPNOTSUPP, f"{self.name} is written by its native engine only")
