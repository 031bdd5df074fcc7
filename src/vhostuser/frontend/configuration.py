"""The configuration space of a device, read, written and watched. Touches one dialogue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from vhostuser.errors import BackendRefused, ConfigRefused, SetupError
from vhostuser.frontend.dialogue import Dialogue
from vhostuser.protocol import Config, FrontendRequest

ConfigListener = Callable[[bytes, bytes], None]


class Configured:
    """The part of `HostDevice` that may be used from any thread, while the connection is good."""

    def __init__(self, dialogue: Dialogue) -> None:
        self.dialogue: Final = dialogue
        self._config_lock = threading.RLock()  # a listener may read, too
        self._config: bytes | None = None
        self._config_listener: ConfigListener | None = None

    def read_config(self, offset: int, size: int, *, flags: int = 0) -> bytes:
        """GET_CONFIG: ``size`` bytes of the configuration space from ``offset`` on. Any thread.

        Raises `BackendRefused` when the back-end says that it has none there.
        """
        answer = self.dialogue.ask(FrontendRequest.GET_CONFIG, Config(offset, size, flags, bytes(size))).payload
        if not isinstance(answer, Config) or (answer.size == 0 and size):
            raise BackendRefused(f"GET_CONFIG of {size} bytes at {offset}")
        return answer.data

    def write_config(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        """SET_CONFIG: write ``data`` at ``offset``; ``flags`` 0 is a write of the driver, 1 of a migration. Any thread.

        Raises `ConfigRefused` when the back-end says no; one that does not acknowledge messages cannot.
        """
        try:
            self.dialogue.tell(FrontendRequest.SET_CONFIG, Config(offset, len(data), flags, data))
        except BackendRefused as error:
            raise ConfigRefused(f"the back-end refused {len(data)} bytes at {offset} of its configuration") from error
        self.dialogue.settle()

    def watch_config(self, size: int, listener: ConfigListener, *, known: bytes | None = None) -> bytes:
        """Return the first ``size`` bytes of the configuration, and call ``listener(old, new)`` when they change.

        It is called on the thread of the back-end channel, or of `refresh_config`, and must not stop the device; at
        once, and here, when the configuration is another one than ``known``: that of an earlier connection.
        """
        with self._config_lock:
            self._config = config = self.read_config(0, size)
            self._config_listener = listener
            if known is not None and config != known:  # while nobody else can hear of another one
                listener(known, config)
            return config

    def refresh_config(self) -> bytes:
        """Read the watched configuration again, and tell the listener if it is another one. Any thread."""
        with self._config_lock:
            if self._config is None:
                raise SetupError("no configuration is watched")
            old, new = self._config, self.read_config(0, len(self._config))
            self._config = new
            if new != old and self._config_listener is not None:
                self._config_listener(old, new)
            return new

    def _hear_config(self) -> None:
        if self._config is not None:
            self.refresh_config()
