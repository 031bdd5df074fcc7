"""A virtio disk: its device side. Public names, nothing else."""

from vhostuser.blk.device import BlockDevice

__all__ = ["BlockDevice"]
