"""A virtio device of any type behind a vhost-user socket. Public names, nothing else."""

from vhostuser.backend.device import ConfigNotice, Device
from vhostuser.backend.rings import RingEvent, RingPlan, RingState
from vhostuser.backend.server import Server
from vhostuser.backend.session import Session

__all__ = ["ConfigNotice", "Device", "RingEvent", "RingPlan", "RingState", "Server", "Session"]
