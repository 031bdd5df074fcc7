"""What both clients of a disk know about it. Touches nothing but the connection it is given."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from vhostuser.errors import ConfigRefused, PeerGone, SetupError
from vhostuser.frontend.dialogue import again
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig

if TYPE_CHECKING:
    from vhostuser.blk.lane import Lane
    from vhostuser.blk.link import DiskLink
    from vhostuser.protocol import ProtocolFeature


class DiskFacts:
    """The disk behind a connection, which is another one after a reconnection. Any thread."""

    def __init__(self, link: DiskLink) -> None:
        self._link = link
        self._turn = itertools.count()
        self._copied_before = 0

    @property
    def size(self) -> int:
        """The size of the disk in bytes, as far as the back-end has told."""
        return self._link.limits.size

    @property
    def block_size(self) -> int:
        """The size of a logical block in bytes: what offsets and lengths are multiples of."""
        return self._link.limits.block_size

    @property
    def read_only(self) -> bool:
        """Whether the disk can only be read."""
        return self._link.limits.read_only

    @property
    def config(self) -> VirtioBlkConfig:
        """The configuration space; fields of features that are not in use mean nothing."""
        return self._link.config

    @property
    def features(self) -> int:
        """The virtio feature bits in use: offered by the back-end and known here."""
        return self._link.features

    @property
    def protocol_features(self) -> ProtocolFeature:
        """The protocol features in use."""
        return self._link.protocol_features

    @property
    def num_queues(self) -> int:
        """How many queues carry the requests."""
        return self._link.options.queues

    @property
    def write_cache(self) -> bool:
        """Whether a write may be answered before it is durable; ``flush`` makes it so."""
        if self.features & BlkFeature.CONFIG_WCE:
            return bool(self.config.writeback)
        return bool(self.features & BlkFeature.FLUSH)

    @property
    def copied_bytes(self) -> int:
        """How many bytes were copied because they were in other buffers than those of ``allocate``."""
        return self._copied_before + self._link.copied_bytes

    @property
    def outstanding(self) -> int:
        """How many requests are in the rings now."""
        return sum(lane.outstanding for lane in self._link.lanes)

    def _lane(self, link: DiskLink, queue: int | None) -> Lane:
        """The queue asked for, or the next in turn."""
        lanes = link.lanes
        if not lanes:
            raise again(link.error or PeerGone("the connection is closed"))
        if queue is None:
            queue = self._next_turn() % len(lanes)
        if not 0 <= queue < len(lanes):
            raise SetupError(f"there are {len(lanes)} queues, and no queue {queue}")
        return lanes[queue]

    def _next_turn(self) -> int:
        return next(self._turn)


def switch_write_cache(link: DiskLink, *, enabled: bool) -> None:
    """Switch the volatile write cache on or off, and make sure of it. Blocks. Raises `ConfigRefused`."""
    if not link.features & BlkFeature.CONFIG_WCE:
        raise ConfigRefused("the disk does not offer to switch its write cache")
    link.set_write_cache(enabled)
    if bool(link.config.writeback) is not enabled:
        raise ConfigRefused(f"the write cache is still {'off' if enabled else 'on'} after it was switched")


def serial_of(answer: bytes) -> str:
    """The text in what GET_ID brought: it ends at the first zero, and some devices fill up with spaces."""
    return answer.partition(b"\0")[0].decode("ascii", "replace").rstrip()
