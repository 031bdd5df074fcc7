"""The host side of a device, for any back-end. Public names, nothing else."""

from vhostuser.frontend.client import USABLE, HostDevice, Life
from vhostuser.frontend.memory import Buffer, SharedMemory
from vhostuser.frontend.queue import HostQueue, plain_queue, request_queue, ring_bytes
from vhostuser.frontend.raw import DescriptorKind, RawFrontend, RawMessage, RawRing, raw_queue
from vhostuser.frontend.reach import Endpoint
from vhostuser.frontend.reconnect import Backoff

__all__ = [
    "USABLE",
    "Backoff",
    "Buffer",
    "DescriptorKind",
    "Endpoint",
    "HostDevice",
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
