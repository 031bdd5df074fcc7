"""How to connect to a disk, and what is told of one. Touches nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vhostuser.blk.limits import MAX_REQUEST_BYTES
from vhostuser.errors import SetupError
from vhostuser.frontend.memory import PAGE
from vhostuser.frontend.negotiated import USABLE
from vhostuser.frontend.queue import check_size
from vhostuser.protocol import ProtocolFeature
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig
from vhostuser.virtio.features import RingFeature

USABLE_FEATURES: Final = int(
    BlkFeature.SIZE_MAX
    | BlkFeature.SEG_MAX
    | BlkFeature.GEOMETRY
    | BlkFeature.RO
    | BlkFeature.BLK_SIZE
    | BlkFeature.FLUSH
    | BlkFeature.TOPOLOGY
    | BlkFeature.CONFIG_WCE
    | BlkFeature.MQ
    | BlkFeature.DISCARD
    | BlkFeature.WRITE_ZEROES
) | int(RingFeature.INDIRECT_DESC | RingFeature.EVENT_IDX | RingFeature.VERSION_1)
"""The features that a client makes use of; it does without each of them."""

CONFIG_SIZES: Final = (60, 36, 8)
"""What is asked of the configuration space, in turn: up to the last field of the features above, as Cloud Hypervisor,
Firecracker and libblkio do; the least that QEMU asks for; the capacity alone."""


MAX_TIMEOUT_S: Final = 1_000_000.0
"""What still fits into the milliseconds of poll(2)."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to connect to a disk. `vhostuser.connect` explains them."""

    queues: int = 1
    queue_size: int = 128
    memory: int = 64 << 20
    copy_memory: int | None = None
    timeout_s: float = 10.0
    request_timeout_s: float = 30.0
    listen: bool = False
    huge_pages: bool = False
    features: int = USABLE_FEATURES
    protocol_features: ProtocolFeature = USABLE

    def check(self) -> None:
        """Raise `SetupError` for numbers that make no sense."""
        check_size(self.queue_size)
        if self.queue_size < 4:
            raise SetupError(f"a queue of a disk has at least 4 descriptors, not {self.queue_size}")
        if not 1 <= self.queues <= 256:
            raise SetupError(f"a disk has 1 to 256 queues, not {self.queues}")
        for limit in (self.timeout_s, self.request_timeout_s):
            if not 0 < limit <= MAX_TIMEOUT_S:
                raise SetupError(f"a time limit is more than 0 and at most {MAX_TIMEOUT_S:.0f} s, not {limit}")

    @property
    def copies(self) -> int:
        """Bytes for copies, of each queue."""
        if self.copy_memory is None:
            return max(4 * MAX_REQUEST_BYTES, self.queue_size * 16384)
        return max(self.copy_memory // PAGE * PAGE, MAX_REQUEST_BYTES)


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """The configuration of a disk was another one before, and is this now."""

    old: VirtioBlkConfig
    new: VirtioBlkConfig


ChangeListener = Callable[[ConfigChange], None]
