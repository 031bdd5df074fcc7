"""The host side of a device, for any back-end. Public names, nothing else."""

from vhostuser.frontend.client import USABLE, HostDevice, Life
from vhostuser.frontend.memory import Buffer, SharedMemory
from vhostuser.frontend.queue import HostQueue, plain_queue, request_queue, ring_bytes
from vhostuser.frontend.reach import Endpoint
from vhostuser.frontend.reconnect import Backoff

__all__ = [
    "USABLE",
    "Backoff",
    "Buffer",
    "Endpoint",
    "HostDevice",
    "HostQueue",
    "Life",
    "SharedMemory",
    "plain_queue",
    "request_queue",
    "ring_bytes",
]
