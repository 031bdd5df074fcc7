"""The host side of a device, for any back-end. Public names, nothing else."""

from vhostuser.frontend.client import HostDevice
from vhostuser.frontend.dirty_log import DirtyPages, HostLog
from vhostuser.frontend.inflight import HostInflight
from vhostuser.frontend.memory import Buffer, SharedMemory
from vhostuser.frontend.negotiated import MOVABLE, RESUMABLE, USABLE, Life
from vhostuser.frontend.queue import HostQueue, plain_queue, request_queue, ring_bytes
from vhostuser.frontend.raw import DescriptorKind, RawFrontend, RawMessage, RawRing, raw_queue
from vhostuser.frontend.reach import Endpoint
from vhostuser.frontend.reconnect import Backoff

__all__ = [
    "MOVABLE",
    "RESUMABLE",
    "USABLE",
    "Backoff",
    "Buffer",
    "DescriptorKind",
    "DirtyPages",
    "Endpoint",
    "HostDevice",
    "HostInflight",
    "HostLog",
    "HostQueue",
    "Life",
    "RawFrontend",
    "RawMessage",
    "RawRing",
    "SharedMemory",
    "plain_queue",
    "raw_queue",
    "request_queue",
    "ring_bytes",
]
