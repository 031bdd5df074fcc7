"""A virtio disk: its device side. Public names, nothing else."""

from vhostuser.blk.device import BlockDevice
from vhostuser.blk.policy import ErrorAction, ErrorPolicy, RateLimit

__all__ = ["BlockDevice", "ErrorAction", "ErrorPolicy", "RateLimit"]
