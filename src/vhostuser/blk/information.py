"""What a person wants to know about a served disk. Touches nothing but the device it asks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig
from vhostuser.virtio.features import feature_names

if TYPE_CHECKING:
    from vhostuser.blk.device import BlockDevice


def information(device: BlockDevice, config: VirtioBlkConfig, acked: int | None) -> dict[str, object]:
    """The facts, ready for JSON. ``acked``: the features that the driver chose, if it has. Any thread."""
    engine = device.disk.engine()
    return {
        "disk": device.name,
        "engine": engine.name if engine is not None else None,
        "size": device.size,
        "block_size": device.block_size,
        "physical_block_size": device.block_size << config.physical_block_exp,
        "read_only": device.read_only,
        "writeback": device.writeback,
        "image": device.disk.holding.value,
        "flush_failed": device.queues.flush_failed,
        "on_error": device.errors.on_error.value,
        "on_enospc": device.errors.on_enospc.value,
        "rate_limit": asdict(device.rate_limit),
        "num_queues": device.num_queues,
        "connected": device.connected,
        "features_offered": feature_names(device.features, BlkFeature),
        "features_acked": feature_names(acked, BlkFeature) if acked is not None else None,
    }
