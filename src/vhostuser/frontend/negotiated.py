"""What was negotiated on one connection, and what can be asked of it for that. Touches one dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

from vhostuser.errors import BackendUnfit, SetupError
from vhostuser.frontend.configuration import Configured
from vhostuser.frontend.dialogue import Dialogue
from vhostuser.frontend.memory import SharedMemory
from vhostuser.frontend.queue import HostQueue
from vhostuser.protocol import (
    F_ACCESS_PLATFORM,
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    FrontendRequest,
    ProtocolFeature,
)
from vhostuser.virtio.features import feature_names
from vhostuser.virtio.status import DeviceStatus

Req = FrontendRequest
Queue = HostQueue[Any]

USABLE: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""The protocol features that `HostDevice` makes use of; it does without each of them."""

RESUMABLE: Final = USABLE | ProtocolFeature.INFLIGHT_SHMFD
"""The same, and what it takes to go on after the back-end has died: for who means to come back. Such a back-end may end
without answering everything, since somebody will."""

MOVABLE: Final = (
    RESUMABLE | ProtocolFeature.LOG_SHMFD | ProtocolFeature.DEVICE_STATE | ProtocolFeature.GET_VRING_BASE_INFLIGHT
)
"""The same, and what it takes to go on at another back-end while this one is there: the dirty log, the state of the
device, and rings that stop before everything is answered."""


class Life(Enum):
    """How far a `HostDevice` has got."""

    CONNECTED = "connected"
    REALIZED = "realized"
    STARTED = "started"
    CLOSED = "closed"


class Negotiated(Configured):
    """The part of `HostDevice` that knows what its back-end offers, and says which features are used."""

    def __init__(self, name: str, dialogue: Dialogue, *, features: int, protocol_features: ProtocolFeature) -> None:
        """``features`` and ``protocol_features`` are what the caller can use."""
        super().__init__(dialogue)
        self.name: Final = name
        self.life = Life.CONNECTED
        self._wanted = features
        self._wanted_protocol = protocol_features
        self._memory: SharedMemory | None = None
        self._queues: Sequence[Queue] = ()

    @property
    def features_offered(self) -> int:
        """The feature bits of the back-end, bit 30 included; 0 before `realize`."""
        return self.dialogue.connection.features_offered or 0

    @property
    def features(self) -> int:
        """The virtio feature bits that are used: offered and wanted, without bits 26 and 30, which are the protocol's
        own."""
        wanted = self._wanted & ~(F_PROTOCOL_FEATURES | F_LOG_ALL)
        if not self.protocol_features & ProtocolFeature.BACKEND_REQ or not self.dialogue.acks:
            wanted &= ~F_ACCESS_PLATFORM  # a miss could not be told, as QEMU sees it
        return self.features_offered & wanted

    @property
    def protocol_features_offered(self) -> ProtocolFeature:
        """The protocol features of the back-end; none before `realize`, or when it has not bit 30."""
        return self.dialogue.connection.protocol_features_offered or ProtocolFeature(0)

    @property
    def protocol_features(self) -> ProtocolFeature:
        """The protocol features that are used."""
        return self.dialogue.connection.protocol_features

    def accept_features(self) -> None:
        """SET_FEATURES, as far as that takes. `start` does it, too; a write to the configuration may need it before."""
        self._set_status(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
        self._set_features()
        if ProtocolFeature.STATUS not in self.protocol_features:
            return
        self._set_status(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK)
        if not self.dialogue.number(Req.GET_STATUS) & DeviceStatus.FEATURES_OK:
            raise BackendUnfit(
                self.name,
                f"it does not accept these of the features it offered: {' '.join(feature_names(self.features))}",
                "Report it to the makers of the back-end",
            )

    def _set_features(self, more: int = 0) -> None:
        features = self.features | (self.features_offered & F_PROTOCOL_FEATURES) | more
        self.dialogue.tell(Req.SET_FEATURES, U64(features))

    def _set_status(self, status: DeviceStatus) -> None:
        if ProtocolFeature.STATUS in self.protocol_features:
            self.dialogue.tell(Req.SET_STATUS, U64(status))

    def _expect(self, life: Life) -> None:
        if self.life is not life:
            raise SetupError(f"{self.name} is {self.life.value}, not {life.value}")
