"""Virtual disks for virtual machines, from Python. Public names, each imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhostuser._native import Chain, ChainQueues, GuestMemory
    from vhostuser.backend import ConfigNotice, Device, Server
    from vhostuser.blk import BlockDevice, ErrorAction, ErrorPolicy, RateLimit
    from vhostuser.blk.aio import AsyncBlockClient, connect_async
    from vhostuser.blk.client import BlockClient, connect
    from vhostuser.blk.fileobj import DiskFile
    from vhostuser.blk.migration import Migration
    from vhostuser.blk.options import ConfigChange
    from vhostuser.blk.requests import Discard, Flush, GetId, Read, ReadInto, Write, WriteZeroes
    from vhostuser.control import ControlClient, ControlServer
    from vhostuser.disks import (
        Capability,
        Disk,
        FileDisk,
        Limits,
        MemoryDisk,
        NativeDisk,
        NullDisk,
        open_disk,
        parse_size,
    )
    from vhostuser.disks.faulty import Faults, FaultyDisk
    from vhostuser.errors import (
        BackendRefused,
        BackendUnfit,
        ConfigRefused,
        DrainTimeout,
        GuestMemoryError,
        LocalProtocolError,
        MigrationFailed,
        OperatorError,
        PeerGone,
        ProtocolError,
        RemoteProtocolError,
        RemoteRingError,
        RequestFailed,
        RequestRefused,
        SetupError,
        UsageError,
        VhostUserError,
    )
    from vhostuser.fds import Fd
    from vhostuser.frontend import Backoff, Buffer, HostDevice, SharedMemory
    from vhostuser.methods import disk_methods
    from vhostuser.transport import Listener, Transport, adopt, listen
    from vhostuser.virtio.blk import BlkFeature
    from vhostuser.virtio.features import RingFeature

__version__ = "0.1.0"

_HOMES = {
    "_native": ("Chain", "ChainQueues", "GuestMemory"),
    "backend": ("ConfigNotice", "Device", "Server"),
    "blk": ("BlockDevice", "ErrorAction", "ErrorPolicy", "RateLimit"),
    "blk.aio": ("AsyncBlockClient", "connect_async"),
    "blk.client": ("BlockClient", "connect"),
    "blk.fileobj": ("DiskFile",),
    "blk.migration": ("Migration",),
    "blk.options": ("ConfigChange",),
    "blk.requests": ("Discard", "Flush", "GetId", "Read", "ReadInto", "Write", "WriteZeroes"),
    "control": ("ControlClient", "ControlServer"),
    "disks": (
        "Capability",
        "Disk",
        "FileDisk",
        "Limits",
        "MemoryDisk",
        "NativeDisk",
        "NullDisk",
        "open_disk",
        "parse_size",
    ),
    "disks.faulty": ("Faults", "FaultyDisk"),
    "errors": (
        "BackendRefused",
        "BackendUnfit",
        "ConfigRefused",
        "DrainTimeout",
        "GuestMemoryError",
        "LocalProtocolError",
        "MigrationFailed",
        "OperatorError",
        "PeerGone",
        "ProtocolError",
        "RemoteProtocolError",
        "RemoteRingError",
        "RequestFailed",
        "RequestRefused",
        "SetupError",
        "UsageError",
        "VhostUserError",
    ),
    "fds": ("Fd",),
    "methods": ("disk_methods",),
    "frontend": ("Backoff", "Buffer", "HostDevice", "SharedMemory"),
    "transport": ("Listener", "Transport", "adopt", "listen"),
    "virtio.blk": ("BlkFeature",),
    "virtio.features": ("RingFeature",),
}
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncBlockClient",
    "BackendRefused",
    "BackendUnfit",
    "Backoff",
    "BlkFeature",
    "BlockClient",
    "BlockDevice",
    "Buffer",
    "Capability",
    "Chain",
    "ChainQueues",
    "ConfigChange",
    "ConfigNotice",
    "ConfigRefused",
    "ControlClient",
    "ControlServer",
    "Device",
    "Discard",
    "Disk",
    "DiskFile",
    "DrainTimeout",
    "ErrorAction",
    "ErrorPolicy",
    "Faults",
    "FaultyDisk",
    "Fd",
    "FileDisk",
    "Flush",
    "GetId",
    "GuestMemory",
    "GuestMemoryError",
    "HostDevice",
    "Limits",
    "Listener",
    "LocalProtocolError",
    "MemoryDisk",
    "Migration",
    "MigrationFailed",
    "NativeDisk",
    "NullDisk",
    "OperatorError",
    "PeerGone",
    "ProtocolError",
    "RateLimit",
    "Read",
    "ReadInto",
    "RemoteProtocolError",
    "RemoteRingError",
    "RequestFailed",
    "RequestRefused",
    "RingFeature",
    "Server",
    "SetupError",
    "SharedMemory",
    "Transport",
    "UsageError",
    "VhostUserError",
    "Write",
    "WriteZeroes",
    "adopt",
    "connect",
    "connect_async",
    "disk_methods",
    "listen",
    "open_disk",
    "parse_size",
]


def __getattr__(name: str) -> object:
    """Imports a public name from its home at its first use, so that a program imports only what it needs."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
