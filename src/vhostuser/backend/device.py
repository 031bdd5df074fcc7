"""A virtio device of any type, as the session sees it. Touches nothing itself."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Final

from vhostuser.errors import ConfigRefused
from vhostuser.protocol import F_LOG_ALL, F_PROTOCOL_FEATURES, ProtocolFeature

if TYPE_CHECKING:
    from vhostuser._native import Queues

PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.GET_VRING_BASE_INFLIGHT
)
"""What the session carries out."""

SESSION_FEATURES: Final = F_PROTOCOL_FEATURES | F_LOG_ALL
"""The feature bits that are the session's and no device's."""

MAX_QUEUES: Final = 256
"""A ring is named by one byte in SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR."""

MAX_QUEUE_SIZE: Final = 32768
"""The largest ring of the virtio specification."""


LOOK_S: Final = 1.0
"""How often `Device.look_for_heir` is called while no ring runs: nothing tells us when somebody begins to wait."""


class ConfigNotice(Enum):
    """What became of the news that the configuration changed. The value is a sentence for a person."""

    SENT = "the guest is told"
    DEFERRED = "the guest is told when it next uses the device"
    NO_CHANNEL = "the guest was not told: its hypervisor opened no channel for it; it sees the change after a restart"
    NOT_CONNECTED = "no guest is connected; the next one sees the change"


Announce = Callable[[], ConfigNotice]


class Device(ABC):
    """What a device type adds to the session: features, configuration, and the queues that do its work.

    All methods but those marked run on the thread of the one session that uses the device. A device outlives its
    sessions; between two of them `reset` is called.
    """

    device_id: ClassVar[int]
    """The virtio device type."""

    has_config: ClassVar[bool] = False
    """Whether there is a configuration space; QEMU warns about the offer of one that it knows the type not to have."""

    has_state: ClassVar[bool] = False
    """Whether `save_state` and `load_state` mean something."""

    max_queue_size: int = MAX_QUEUE_SIZE
    """The largest ring it serves, in entries."""

    def __init__(self) -> None:
        self._news = threading.Lock()
        self._announce: Announce | None = None
        self._generation = 0

    @property
    @abstractmethod
    def name(self) -> str:
        """What a person calls this device, for messages."""

    @property
    @abstractmethod
    def features(self) -> int:
        """The virtio feature bits offered, the same at any time. The session adds VHOST_USER_F_PROTOCOL_FEATURES."""

    @property
    @abstractmethod
    def queues(self) -> Queues:
        """The native queues that serve the rings, the same ones at any time. Owned by the device."""

    @property
    def protocol_features(self) -> ProtocolFeature:
        """The protocol features offered to front-ends, the same at any time; never more than `PROTOCOL_FEATURES`."""
        lacking = ProtocolFeature(0) if self.has_config else ProtocolFeature.CONFIG
        return PROTOCOL_FEATURES & ~(lacking if self.has_state else lacking | ProtocolFeature.DEVICE_STATE)

    @property
    def fenced(self) -> bool:
        """Whether no two devices can work on its storage, nor one before the last request of a killed one has ended."""
        return True

    @property
    def num_queues(self) -> int:
        """How many rings it has, 1 to 256."""
        return self.queues.num_queues

    def read_config(self, offset: int, size: int) -> bytes:
        """The configuration space from ``offset`` on; what lies beyond its end reads as zeroes."""
        return bytes(size)

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        """Carry out a write of the driver to the configuration space.

        ``flags`` as in SET_CONFIG: peers disagree about their meaning. Raises `ConfigRefused`; nothing is changed then.
        """
        raise ConfigRefused(f"a driver may not write {len(data)} bytes at {offset} of the configuration")

    def features_acked(self, features: int) -> None:  # noqa: B027  a device may have nothing to do
        """The driver chose these of the offered virtio features; may come again, also while rings run.

        Raises `SetupError` for a choice that the device cannot work with.
        """

    def status_changed(self, status: int) -> None:  # noqa: B027
        """The driver set the virtio device status to ``status``, which is not 0."""

    def keepsake(self) -> bytes:
        """What of the driver's choices nobody will repeat to a successor, at most 48 bytes; empty: nothing.

        Kept with the requests in flight, where a front-end has a region for those, and given to `recall` of the device
        that goes on there.
        """
        return b""

    def recall(self, keepsake: bytes) -> None:  # noqa: B027
        """Take over what `keepsake` of a predecessor of the same type said. All rings are stopped. What makes no sense
        is ignored: a front-end may have written it."""

    def activate(self) -> None:  # noqa: B027
        """Have the storage before the first ring starts. Raises `OperatorError` when another server has it. May wait.

        A live migration has two servers for one disk, only one of which may use it: the one whose rings run.
        """

    def deactivate(self, *, unused: bool = False) -> None:  # noqa: B027
        """The last ring has stopped and its requests have ended: another server may have the storage. May wait.

        ``unused``: no ring has run since `activate`, which is to be undone.
        """

    def look_for_heir(self) -> bool:
        """Let go of the storage if no ring runs and another server waits for it; whether to look again in a while."""
        return False

    def save_state(self) -> bytes:
        """What another device of the same type has to know to go on here, beside storage, rings and requests.

        All rings are stopped; the device may go on itself afterwards. At most 1 MiB.
        """
        return b""

    def load_state(self, state: bytes) -> None:
        """Go on where the device was whose `save_state` this is. No ring runs.

        Raises `ConfigRefused` for a state that is damaged, unknown, or of a device that does not fit; nothing is
        changed then.
        """
        raise ConfigRefused("this type of device has no state")

    def reset(self) -> None:  # noqa: B027
        """Return to the initial state: the driver reset the device, or its connection ended. All rings are stopped."""

    def close(self) -> None:
        """End the queues and give back what the device holds. Idempotent. Any thread, once no session uses it."""
        self.queues.close()

    @property
    def connected(self) -> bool:
        """Whether a front-end uses the device now. Any thread."""
        return self._announce is not None

    @property
    def config_generation(self) -> int:
        """Counts the changes of the configuration that the driver did not make itself. Any thread."""
        return self._generation

    def config_changed(self) -> ConfigNotice:
        """Let the driver know that the configuration is another one now. Any thread; does not wait."""
        with self._news:
            self._generation += 1
            return self._announce() if self._announce is not None else ConfigNotice.NOT_CONNECTED

    def attach(self, announce: Announce | None) -> None:
        """Set how news reach the driver; None when nobody is connected. Called by the session."""
        with self._news:
            self._announce = announce
