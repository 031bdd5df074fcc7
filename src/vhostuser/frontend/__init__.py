"""The host side of a device, for any back-end. Public names, nothing else."""

from vhostuser.frontend.client import RESUMABLE, USABLE, HostDevice, Life
from vhostuser.frontend.inflight import HostInflight
from vhostuser.frontend.memory import Buffer, SharedMemory
from vhostuser.frontend.queue import HostQueue, plain_queue, request_queue, ring_bytes
from vhostuser.frontend.raw import DescriptorKind, RawFrontend, RawMessage, RawRing, raw_queue
from vhostuser.frontend.reach import Endpoint
from vhostuser.frontend.reconnect import Backoff

__all__ = [
    "RESUMABLE",
    "USABLE",
    "Backoff",
    "Buffer",
    "DescriptorKind",
    "Endpoint",
    "HostDevice",
    "HostInflight",
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
