"""The configuration of the disk behind a link: as it is told, as it is switched. Touches the device of the link."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vhostuser.blk.fitness import another
from vhostuser.blk.limits import MAX_SECTORS, DiskLimits
from vhostuser.blk.options import ChangeListener, ConfigChange
from vhostuser.errors import ConfigRefused, PeerGone, VhostUserError
from vhostuser.frontend.dialogue import again
from vhostuser.frontend.inflight import HostInflight
from vhostuser.protocol import ProtocolFeature
from vhostuser.virtio.blk import WRITEBACK_OFFSET, VirtioBlkConfig

if TYPE_CHECKING:
    from vhostuser.frontend.client import HostDevice


class LinkSettings:
    """The part of `DiskLink` that knows the disk's configuration. Any thread."""

    def __init__(self, changed: ChangeListener) -> None:
        """``changed`` hears of changes of the configuration."""
        self.device: HostDevice | None = None
        """The device of the latest connection."""
        self.config = VirtioBlkConfig()
        self.limits: DiskLimits
        self._changed: Final = changed
        self._config_size = 0  # what the back-end tells of it, in bytes
        self._write_cache: bool | None = None  # as it was switched
        self._error: VhostUserError | None = None
        self._away: VhostUserError | None = None
        self._region: HostInflight | None = None  # while it is away

    @property
    def config_size(self) -> int:
        """How much of its configuration the back-end tells, in bytes."""
        return self._config_size

    @property
    def protocol_features(self) -> ProtocolFeature:
        """The protocol features in use."""
        return self._reached().protocol_features

    def set_write_cache(self, enabled: bool) -> None:
        """Write ``writeback`` of the configuration, and read what became of it. Raises `ConfigRefused`."""
        writeback = switched(self._reached(), enabled=enabled)
        self.config = replace(self.config, writeback=writeback)
        if bool(writeback) is enabled:
            self._write_cache = enabled

    def refresh(self) -> None:
        """Read the configuration again."""
        self._reached().refresh_config()

    def hear(self, _old: bytes, new: bytes) -> None:
        """The configuration is another one now."""
        config = VirtioBlkConfig.unpack(new)
        if config.capacity > MAX_SECTORS:
            error = PeerGone(f"the back-end says now that it has {config.capacity} sectors")
            self._reached().dialogue.fail(error)
            return
        before, self.config = self.config, config
        self.limits = replace(self.limits, num_sectors=config.capacity)
        if self._away is not None:
            before = replace(before, writeback=config.writeback)  # `_switch_back` follows
        if config != before:
            self._changed(ConfigChange(before, config))

    def _switch_back(self, device: HostDevice) -> None:
        """Switch the write cache as it was before: a write that is under way may count on it."""
        wanted = self._write_cache
        if wanted is None or bool(self.config.writeback) is wanted:
            return
        device.accept_features()  # there is no such field without them
        try:
            self.set_write_cache(wanted)
        except ConfigRefused as error:
            raise another(device, f"its write cache cannot be switched as it was: {error}") from error
        if bool(self.config.writeback) is not wanted:
            raise another(device, f"its write cache cannot be switched {'on' if wanted else 'off'} again")

    def _reached(self) -> HostDevice:
        if self.device is None:
            raise again(self._error or PeerGone("there is no connection yet"))
        return self.device


def switched(device: HostDevice, *, enabled: bool) -> int:
    """Write ``writeback`` of the configuration, and return what became of it. Raises `ConfigRefused`."""
    device.write_config(WRITEBACK_OFFSET, bytes([enabled]))
    # From the start: libvhost-user does not look at the offset, and answers with the first bytes of all.
    return device.read_config(0, WRITEBACK_OFFSET + 1)[WRITEBACK_OFFSET]
