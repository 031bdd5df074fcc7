"""The virtio disk, device side: features, configuration space, write cache, resize. Touches its disk and native queues.

The requests themselves are served natively; here is what is decided once per connection or per human action.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from vhostuser._native import BlockQueues
from vhostuser.backend.device import ConfigNotice, Device
from vhostuser.blk.fitting import DiskState, StateError, misfit, overlaid
from vhostuser.blk.information import information
from vhostuser.blk.policy import ErrorPolicy, RateLimit
from vhostuser.blk.shape import DEFAULT_SEG_MAX, POLL_US, Options, block_size_of, config_of, features_of, whole_sectors
from vhostuser.disks.disk import Capability, Disk
from vhostuser.errors import ConfigRefused, OperatorError
from vhostuser.virtio.blk import DEVICE_ID, SECTOR, WRITEBACK_OFFSET, BlkFeature

if TYPE_CHECKING:
    from vhostuser._native import InFlight

log = logging.getLogger(__name__)


class BlockDevice(Device):
    """A virtio disk over a `Disk`, for a `Server`.

    `resize`, `refresh`, `statistics` and `info` may be called from any thread, also while a guest uses the disk.
    """

    device_id = DEVICE_ID
    has_config = True
    has_state = True

    def __init__(
        self,
        disk: Disk,
        *,
        num_queues: int = 1,
        num_workers: int | None = None,
        serial: str = "",
        block_size: int | None = None,
        physical_block_size: int | None = None,
        seg_max: int = DEFAULT_SEG_MAX,
        size_max: int = 0,
        poll_us: int = POLL_US,
        errors: ErrorPolicy | None = None,
        rate_limit: RateLimit | None = None,
    ) -> None:
        """Prepare the queues; nothing is served before a `Server` runs. The disk stays the caller's, who closes it.

        ``num_workers``: threads that serve the queues, at most one per queue; by default one per queue and processor.
        ``serial``: what the guest sees as the disk's serial, up to 20 ASCII characters.
        ``block_size``, ``physical_block_size``: in bytes, powers of two; by default what storage says.
        ``seg_max``: data segments per request; ``size_max``: bytes per segment, 0 for no limit; both are for the
        driver's planning and are not enforced. ``poll_us``: how long at most an idle worker looks for requests before
        it sleeps, in microseconds; less where looking was in vain before, 0 for not at all.
        ``errors``: what becomes of requests that storage fails; by default the guest is told. ``rate_limit``: how
        much is taken a second; by default as much as comes.
        Raises `UsageError` for values that make no sense, `OperatorError` when the disk cannot be served with them.
        """
        super().__init__()
        options = Options(num_queues, num_workers, serial, block_size, physical_block_size, seg_max, size_max, poll_us)
        options.check()
        errors = errors or ErrorPolicy()
        errors.check()
        engine = disk.engine()
        if engine is None:
            raise OperatorError(
                disk.name, "it has no native engine and cannot be served", "Serve a file, memory or null disk"
            )
        self._disk = disk
        self._lock = threading.RLock()
        self._block_size = block_size_of(disk.name, disk.limits, options)
        self._num_sectors = self._whole_sectors(disk.limits.size)
        self._default_writeback = self._wanted_writeback = self._writeback = disk.writeback
        self._acked: int | None = None
        self._features = features_of(disk.capabilities, options)
        config = replace(
            config_of(disk.limits, self._features, self._block_size, options),
            capacity=self._num_sectors,
            writeback=int(self._writeback),
        )
        self._config = config
        self._queues = BlockQueues(
            engine,
            num_queues=num_queues,
            num_workers=num_workers or min(num_queues, len(os.sched_getaffinity(0))),
            num_sectors=self._num_sectors,
            block_size=self._block_size,
            read_only=self.read_only,
            writeback=self._writeback,
            device_id=serial.encode("ascii"),
            poll_us=poll_us,
            max_discard_sectors=config.max_discard_sectors,
            max_discard_seg=config.max_discard_seg,
            max_write_zeroes_sectors=config.max_write_zeroes_sectors,
            max_write_zeroes_seg=config.max_write_zeroes_seg,
            on_error=errors.on_error.value,
            on_enospc=errors.on_enospc.value,
            retry_for_s=errors.retry_for_s,
        )
        self._errors = errors
        disk.note_write_cache(on=self._wanted_writeback)
        if rate_limit is not None:
            self._queues.set_rate_limit(rate_limit.iops, rate_limit.bps)

    @property
    def name(self) -> str:
        """The name of the disk."""
        return self._disk.name

    @property
    def disk(self) -> Disk:
        """The disk that is served."""
        return self._disk

    @property
    def features(self) -> int:
        """What the disk can do; never a bit without its behaviour."""
        return self._features

    @property
    def queues(self) -> BlockQueues:
        """The native queues."""
        return self._queues

    @property
    def fenced(self) -> bool:
        """Whether the disk is locked, or ends with this process."""
        return self._disk.fenced

    @property
    def size(self) -> int:
        """What the guest sees, in bytes: whole logical blocks. Any thread."""
        return self._num_sectors * SECTOR

    @property
    def block_size(self) -> int:
        """The logical block size in bytes."""
        return self._block_size

    @property
    def read_only(self) -> bool:
        """Whether the guest may only read."""
        return Capability.WRITE not in self._disk.capabilities

    @property
    def writeback(self) -> bool:
        """Whether a write may complete before it is on stable storage. Any thread."""
        return self._writeback

    def read_config(self, offset: int, size: int) -> bytes:
        """A piece of ``virtio_blk_config``, padded with zeroes to ``size`` bytes."""
        with self._lock:
            return self._config.read(offset, size)

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        """Let the driver switch its write cache: byte 32, 0 or 1, whatever ``flags`` says.

        Switching it off puts what was written so far on stable storage, and waits for that. With ``flags`` (a live
        migration's) any other range is what the driver knew before, and refused when it does not fit. All else is
        refused.
        """
        if (offset, len(data)) != (WRITEBACK_OFFSET, 1):
            if not flags:
                raise ConfigRefused(
                    f"a driver may write byte {WRITEBACK_OFFSET} (writeback) of the configuration, "
                    f"not {len(data)} bytes at {offset}"
                )
            self._restore(offset, data)
            return
        if data[0] > 1:
            raise ConfigRefused(f"writeback is 0 or 1, not {data[0]}")
        if not self._may_switch:
            raise ConfigRefused("the driver did not accept VIRTIO_BLK_F_CONFIG_WCE and may not switch its write cache")
        self._switch_writeback(bool(data[0]))

    def features_acked(self, features: int) -> None:
        """Take the write cache mode that follows from the choice (virtio: Block Device, Device Operation)."""
        self._acked = features
        flush = bool(features & BlkFeature.FLUSH)
        if features & BlkFeature.CONFIG_WCE:
            writeback = self._wanted_writeback and flush
        else:
            writeback = self._default_writeback and flush
        try:
            self._set_writeback(writeback)
        except OSError as error:
            log.error("%s: what was written before cannot be stored: %s", self.name, os.strerror(error.errno or 0))

    def activate(self) -> None:
        """Have the image, and go by what became of it and of its write cache while another server had it."""
        before = self._disk.activate()
        if before is None:
            return
        try:
            sectors = self._whole_sectors(self._disk.refresh())
        except BaseException:
            self._disk.deactivate(unused=True)
            raise
        cache_on = self._writeback
        if before.cache_off:
            self.recall(b"\0")
        if sectors != self._num_sectors:
            self._set_num_sectors(sectors)
        elif cache_on != self._writeback:
            self.config_changed()

    def deactivate(self, *, unused: bool = False) -> None:
        """Let another server have the image, if one waits for it."""
        self._disk.deactivate(unused=unused)

    def look_for_heir(self) -> bool:
        """Likewise, if no ring runs."""
        return self._disk.look_for_heir()

    def reset(self) -> None:
        """Forget the driver's choices, but let a write cache that it switched off stay off.

        QEMU shows its guest the byte it knew before the reset, and a guest that believes its cache off sends no FLUSH.
        """
        self._acked = None
        self._want_writeback(self._wanted_writeback and self._default_writeback)

    def keepsake(self) -> bytes:
        """The byte ``writeback``: a driver that believes its write cache off sends no FLUSH, to a successor neither."""
        return bytes([self._wanted_writeback])

    def recall(self, keepsake: bytes) -> None:
        """Go on without the write cache where the predecessor had none."""
        if keepsake != b"\0":
            return
        self._want_writeback(False)
        if self._acked is not None:
            self.features_acked(self._acked)

    def save_state(self) -> bytes:
        """The mode of the write cache and the configuration, as `DiskState`."""
        with self._lock:
            return DiskState(self._features, self._wanted_writeback, self._config).pack()

    def load_state(self, state: bytes) -> None:
        """Take over the mode of the write cache from a disk that this one can stand in for."""
        try:
            told = DiskState.unpack(state)
        except StateError as error:
            raise ConfigRefused(f"the state is refused: {error}") from error
        self._look_at_size()
        if (cause := told.misfit(self._config, self._features)) is not None:
            raise ConfigRefused(f"the state is of another disk: {cause}")
        self._adopt_writeback(told.writeback)

    def resize(self, size: int) -> ConfigNotice:
        """Make the disk ``size`` bytes large, storage included, and tell the guest. Any thread; may wait for storage.

        Returns what became of telling it. Requests beyond a smaller end fail from now on; those already with storage
        still complete. Raises `UsageError` when the disk or the size does not allow it, `OSError` when storage refuses.
        """
        with self._lock:
            if Capability.RESIZE not in self._disk.capabilities:
                self._disk.resize(size)  # says why not
            sectors = self._whole_sectors(size)
            before = self._num_sectors
            if sectors >= before:
                self._disk.resize(size)
                return self._set_num_sectors(sectors)
            self._queues.set_num_sectors(sectors)
            try:
                self._disk.resize(size)
            except BaseException:
                self._queues.set_num_sectors(before)
                raise
            return self._set_num_sectors(sectors)

    def refresh(self) -> ConfigNotice | None:
        """Look whether storage was resized by someone else, and if so tell the guest. Any thread.

        Returns None when the size is what it was. Raises `UsageError` when nothing is left of the disk.
        """
        with self._lock:
            sectors = self._whole_sectors(self._disk.refresh())
            return None if sectors == self._num_sectors else self._set_num_sectors(sectors)

    def statistics(self) -> list[dict[str, int]]:
        """One dictionary of counters per queue, read without stopping anything. Any thread."""
        return self._queues.stats()

    @property
    def errors(self) -> ErrorPolicy:
        """What becomes of requests that storage fails."""
        return self._errors

    @property
    def rate_limit(self) -> RateLimit:
        """How much is taken a second; may be set at any time. Any thread."""
        return RateLimit(*self._queues.rate_limit)

    @rate_limit.setter
    def rate_limit(self, limit: RateLimit) -> None:
        self._queues.set_rate_limit(limit.iops, limit.bps)
        log.info("%s: the rate limit is %s now", self.name, limit)

    def requests(self) -> list[InFlight]:
        """The requests in flight, queue by queue, each queue's oldest first; nothing is stopped. Any thread."""
        return self._queues.in_flight()

    def retry(self, request: tuple[int, int] | None = None) -> int:
        """Submit requests that storage failed and that are kept again, now; returns how many. Any thread.

        ``request``: queue and head of one; None: all. What is being tried just now is not counted.
        """
        return self._queues.retry(*(request or (None, None)))

    def fail(self, request: tuple[int, int] | None = None) -> int:
        """Tell the guest of the failure of requests that are kept; otherwise like `retry`. Any thread."""
        return self._queues.fail(*(request or (None, None)))

    def info(self) -> dict[str, object]:
        """What a person wants to know about the disk, ready for JSON. Any thread."""
        return information(self, self._config, self._acked)

    def _whole_sectors(self, size: int) -> int:
        sectors, tail = whole_sectors(self._disk.name, size, self._block_size)
        if tail:
            left = "%s: the last %d bytes do not fill a block of %d and are not served"
            log.warning(left, self._disk.name, tail, self._block_size)
        return sectors

    def _restore(self, offset: int, data: bytes) -> None:
        """Go on as the disk whose configuration has ``data`` at ``offset``."""
        self._look_at_size()
        told = overlaid(self._config, offset, data)
        if told is None:
            raise ConfigRefused(f"there is no configuration in {len(data)} bytes at {offset}")
        if (cause := misfit(told, self._config, self._features)) is not None:
            raise ConfigRefused(f"the configuration is of another disk: {cause}")
        if told.writeback != self._config.writeback and self._may_switch:
            self._adopt_writeback(bool(told.writeback))

    def _look_at_size(self) -> None:
        try:
            self.refresh()
        except (OperatorError, OSError) as error:
            raise ConfigRefused(f"nobody knows whether the disk fits: {error}") from error

    @property
    def _may_switch(self) -> bool:
        return self._acked is None or bool(self._acked & BlkFeature.CONFIG_WCE)

    def _adopt_writeback(self, on: bool) -> None:
        """Have the write cache as the driver had it elsewhere."""
        before = self._writeback
        self._switch_writeback(on)
        if self._acked is not None:
            self.features_acked(self._acked)
        if self._writeback != before:
            self.config_changed()

    def _switch_writeback(self, on: bool) -> None:
        before = self._wanted_writeback
        self._want_writeback(on)
        try:
            self._set_writeback(on)
        except OSError as error:
            self._want_writeback(before)
            self._set_writeback(before)
            raise ConfigRefused(
                f"the write cache stays on: what it holds cannot be stored ({os.strerror(error.errno or 0)})"
            ) from error

    def _want_writeback(self, on: bool) -> None:
        self._wanted_writeback = on
        self._disk.note_write_cache(on=on)

    def _set_writeback(self, writeback: bool) -> None:
        """Switch the write cache; once it is off, flush what it held. Raises `OSError` of the flush."""
        was, self._writeback = self._writeback, writeback
        self._queues.set_writeback(writeback)
        with self._lock:
            self._config = replace(self._config, writeback=int(writeback))
        if was and not writeback and not self.read_only:
            self._disk.flush()

    def _set_num_sectors(self, sectors: int) -> ConfigNotice:
        """The native bound first, then the configuration, then the news."""
        self._queues.set_num_sectors(sectors)
        with self._lock:
            self._num_sectors = sectors
            self._config = replace(self._config, capacity=sectors)
        notice = self.config_changed()
        log.info("%s: the disk has %d bytes now: %s", self.name, sectors * SECTOR, notice.value)
        return notice
