"""What a back-end says of its disk before anything is done with it. Touches one connection, and shares no memory.

The messages are those of a hypervisor that connects and does not start its guest: nothing changes in the back-end but
that it has a front-end for a moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vhostuser.blk.options import CONFIG_SIZES
from vhostuser.errors import BackendRefused, PeerGone, RemoteProtocolError
from vhostuser.frontend.client import HostDevice
from vhostuser.frontend.negotiated import USABLE
from vhostuser.frontend.reach import Endpoint
from vhostuser.protocol import F_PROTOCOL_FEATURES, FrontendRequest, ProtocolFeature
from vhostuser.virtio.blk import VirtioBlkConfig, config_length

LARGEST_CONFIG: Final = 256
"""What SPDK asks of the configuration space, always."""

FIELD_OFFSET: Final = 8
"""Where the configuration has something else than at its start: `size_max`, behind the capacity."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What one back-end said."""

    socket: str
    features: int
    """The feature bits that it offers, bit 30 included."""
    protocol_features: ProtocolFeature
    num_queues: int | None
    """None: it does not offer to tell."""
    mem_slots: int | None
    """None: it does not offer memory slots."""
    status: int | None
    """The device status; None: it does not offer to tell."""
    config: VirtioBlkConfig | None
    """Fields of features that are not offered mean nothing. None: it does not tell its configuration."""
    config_bytes: int
    """How much it told at once."""
    refusals: tuple[str, ...]
    """What went wrong with the configuration, in words."""
    largest_config: bool
    """Whether it answers when asked for `LARGEST_CONFIG` bytes."""
    config_by_field: bool
    """Whether a piece of the configuration is what the whole has at that offset."""

    @property
    def speaks(self) -> bool:
        """Whether it has protocol features at all."""
        return bool(self.features & F_PROTOCOL_FEATURES)

    @property
    def abstract(self) -> bool:
        """Whether its socket has a name that is no path."""
        return self.socket.startswith("@")


def probe(endpoint: Endpoint, *, timeout_s: float = 10.0) -> Findings:
    """Connect to ``endpoint``, ask, and hang up. ``timeout_s`` bounds the connection and every answer.

    Raises `OperatorError` when nobody is there, `PeerGone` for silence or a back-end that hangs up, and
    `RemoteProtocolError` for one that breaks the rules.
    """
    # Without a channel of its own the back-end has nothing to send us.
    wanted = USABLE & ~ProtocolFeature.BACKEND_REQ
    with HostDevice(endpoint, protocol_features=wanted, timeout_s=timeout_s) as device:
        device.realize()
        status = None
        if ProtocolFeature.STATUS in device.protocol_features:
            status = device.dialogue.number(FrontendRequest.GET_STATUS)
        features, refusals = device.features_offered, list[str]()
        config, largest, by_field = b"", False, False
        if ProtocolFeature.CONFIG in device.protocol_features:
            config = told_config(device, features, refusals)
            by_field = _answers_by_field(device, config, refusals)
            largest = _answers_largest(device, refusals)
        return Findings(
            socket=device.name,
            features=features,
            protocol_features=device.protocol_features_offered,
            num_queues=device.max_queues if ProtocolFeature.MQ in device.protocol_features else None,
            mem_slots=device.max_mem_slots,
            status=status,
            config=VirtioBlkConfig.unpack(config) if config else None,
            config_bytes=len(config),
            refusals=tuple(refusals),
            largest_config=largest,
            config_by_field=by_field,
        )


def told_config(device: HostDevice, features: int, refusals: list[str]) -> bytes:
    """As much of the configuration as the features reach, or less; nothing when even the capacity is refused.

    What was refused is added to ``refusals``, in words.
    """
    whole, *less = CONFIG_SIZES
    for size in (max(whole, config_length(features)), *less):
        try:
            return device.read_config(0, size)
        except BackendRefused as error:
            refusals.append(str(error))
    return b""


def _answers_by_field(device: HostDevice, config: bytes, refusals: list[str]) -> bool:
    """libvhost-user answers any offset with the first bytes. A configuration that cannot show it gets the benefit."""
    if not config:
        return False
    length = len(config) - FIELD_OFFSET
    try:
        return device.read_config(FIELD_OFFSET, length) == config[FIELD_OFFSET:]
    except BackendRefused as error:
        refusals.append(str(error))
        return False


def _answers_largest(device: HostDevice, refusals: list[str]) -> bool:
    """The last question, since there are back-ends that hang up on it."""
    try:
        device.read_config(0, LARGEST_CONFIG)
    except (BackendRefused, RemoteProtocolError, PeerGone) as error:
        refusals.append(str(error))
        return False
    return True
