"""Storage behind virtual disks; knows nothing of vhost. Public names, nothing else; `faulty` is asked for by itself."""

from vhostuser.disks.custody import Holding, Takeover
from vhostuser.disks.disk import Capability, Disk, Limits, NativeDisk
from vhostuser.disks.file import FileDisk
from vhostuser.disks.memory import MemoryDisk
from vhostuser.disks.null import NullDisk
from vhostuser.disks.registry import open_disk, parse_size

__all__ = [
    "Capability",
    "Disk",
    "FileDisk",
    "Holding",
    "Limits",
    "MemoryDisk",
    "NativeDisk",
    "NullDisk",
    "Takeover",
    "open_disk",
    "parse_size",
]
