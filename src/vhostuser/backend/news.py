"""News of a changed configuration: when the front-end may hear them, and over what. Touches the back-end channel."""

from __future__ import annotations

import logging
import selectors
from typing import TYPE_CHECKING

from vhostuser.backend.channel import Channel
from vhostuser.backend.device import ConfigNotice
from vhostuser.errors import PeerGone, RemoteProtocolError
from vhostuser.protocol import ProtocolFeature

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhostuser.backend.device import Device
    from vhostuser.backend.vrings import Vrings
    from vhostuser.fds import Fd
    from vhostuser.protocol import Connection

log = logging.getLogger(__name__)


class News:
    """Sends CONFIG_CHANGE_MSG when the front-end does not know the configuration and the device is in use.

    While all rings are stopped nothing may be sent, and QEMU would ignore it. Runs on the session thread, but `notice`.
    """

    def __init__(self, device: Device, rings: Vrings, main: Connection[Fd], selector: selectors.BaseSelector) -> None:
        """Watches the channel of the connection ``main`` in ``selector``, where a key's data is what to call."""
        self._device = device
        self._main = main
        self._rings = rings
        self._selector = selector
        self._channel: Channel | None = None
        self._known: int | None = None

    def open(self, fd: Fd) -> None:
        """Use another channel from now on: ``fd``, which it takes. Raises `SetupError`."""
        try:
            channel = Channel(fd, self._main)
        except BaseException:
            fd.close()
            raise
        self.close()
        self._channel = channel
        self._watch(channel)

    def served(self) -> None:
        """The front-end reads the configuration."""
        self._known = self._device.config_generation

    def notice(self) -> ConfigNotice:
        """What becomes of a change now. Any thread."""
        if self._channel is None or ProtocolFeature.CONFIG not in self._main.protocol_features:
            return ConfigNotice.NO_CHANNEL
        return ConfigNotice.SENT if self._rings.active else ConfigNotice.DEFERRED

    def tell(self) -> None:
        """Send what is due, without waiting."""
        if self._channel is None or self._known == self._device.config_generation:
            return
        if self.notice() is ConfigNotice.SENT:
            self.served()
            self._use(self._channel.config_changed)

    def close(self) -> None:
        """Close the channel, if there is one."""
        channel, self._channel = self._channel, None
        if channel is None:
            return
        if channel.fileno() in self._selector.get_map():
            self._selector.unregister(channel)
        channel.close()

    def _use(self, use: Callable[[], None]) -> None:
        """Read or write the channel, which is closed when that fails, and watch it for what it waits for."""
        channel = self._channel
        if channel is None:
            return
        try:
            use()
        except (PeerGone, RemoteProtocolError) as error:
            level = logging.INFO if isinstance(error, PeerGone) else logging.WARNING
            log.log(level, "%s: no more news reach the guest: %s", self._device.name, error)
            self.close()
        else:
            self._watch(channel)

    def _watch(self, channel: Channel) -> None:
        events = (selectors.EVENT_READ if channel.readable else 0) | (selectors.EVENT_WRITE if channel.waiting else 0)
        if channel.fileno() in self._selector.get_map():
            self._selector.unregister(channel)
        if events:
            self._selector.register(channel, events, lambda: self._use(channel.step))
