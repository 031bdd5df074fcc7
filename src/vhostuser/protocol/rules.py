"""What each request carries, answers, attaches and requires: one table for both roles. Touches nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from enum import Enum, auto
from typing import Final, TypeVar

from vhostuser.protocol.device_state import DeviceStateParams, DeviceStateReply, Direction, Phase
from vhostuser.protocol.ids import (
    F_ACCESS_PLATFORM,
    F_PROTOCOL_FEATURES,
    MAX_FDS,
    BackendRequest,
    FrontendRequest,
    ProtocolFeature,
)
from vhostuser.protocol.layout import Payload, Violation
from vhostuser.protocol.payloads import (
    U64,
    Config,
    Inflight,
    Iotlb,
    IotlbType,
    Log,
    MemoryTable,
    Nothing,
    Raw,
    SharedObject,
    ShmemConfig,
    ShmemMmap,
    SingleRegion,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
    XenMemoryTable,
    XenSingleRegion,
)

F = TypeVar("F")

NO_FEATURE: Final = ProtocolFeature(0)


class Fds(Enum):
    """How many descriptors come with a message."""

    NONE = auto()
    ONE = auto()
    AT_MOST_ONE = auto()
    UNWANTED = auto()  # none; peers send one, which is closed
    ONE_PER_REGION = auto()
    UNLESS_NO_FD = auto()  # one, or none where the payload's bit 8 says so
    UNLESS_EMPTY = auto()  # one, or none where the payload's mmap_size is 0
    ANY = auto()  # nobody knows

    def accepted(self, payload: Payload) -> tuple[int, int]:
        """Return the least and the most descriptors that ``payload`` may come with."""
        match self, payload:
            case Fds.ONE, _:
                return 1, 1
            case Fds.AT_MOST_ONE, _:
                return 0, 1
            case Fds.ANY, _:
                return 0, MAX_FDS
            case Fds.ONE_PER_REGION, MemoryTable(regions):
                return len(regions), len(regions)
            case Fds.UNLESS_NO_FD, VringFd(no_fd=no_fd) | VringArea(no_fd=no_fd) | DeviceStateReply(no_fd=no_fd):
                return (0, 0) if no_fd else (1, 1)
            case Fds.UNLESS_EMPTY, Inflight(mmap_size=mmap_size):
                return (1, 1) if mmap_size else (0, 0)
        return 0, 0

    def settle(self, payload: Payload, fds: tuple[F, ...], *, sending: bool) -> tuple[tuple[F, ...], tuple[F, ...]]:
        """Return the descriptors that belong to the message, and those that a receiver closes without complaint.

        Raises `Violation` when there are too few or too many.
        """
        least, most = self.accepted(payload)
        tolerant = self in (Fds.UNWANTED, Fds.UNLESS_NO_FD, Fds.UNLESS_EMPTY)
        if tolerant and most == 0 and len(fds) == 1 and not sending:
            return (), fds
        if not least <= len(fds) <= most:
            due = str(most) if least == most else f"{least} to {most}"
            raise Violation(f"{len(fds)} descriptors came where {due} belong")
        return fds, ()


Values = Mapping[str, Collection[int]]
Failure = Callable[[int], Payload]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table of messages."""

    payload: type[Payload] = Nothing
    """What the request carries."""
    _: KW_ONLY
    reply: type[Payload] | None = None
    """The payload of its own reply; None: it is acknowledged when it asks for that and REPLY_ACK is negotiated."""
    fds: Fds = Fds.NONE
    """Descriptors attached to the request."""
    reply_fds: Fds = Fds.NONE
    """Descriptors attached to its own reply."""
    needs: ProtocolFeature = NO_FEATURE
    """Protocol features without which it may not be sent."""
    needs_offered: int = 0
    """Feature bits that GET_FEATURES must have shown."""
    needs_acked: int = 0
    """Feature bits that SET_FEATURES must have set."""
    lenient: bool = False
    """True where only the sender is held to the needs: peers are known to send it without."""
    values: Values | None = None
    """Fields that have few legal values, and these."""
    failure: Failure | None = None
    """Its own reply's way to say that it failed with a code; None: there is none, the connection must be closed."""
    any_reply: bool = False
    """True where back-ends answer with other layouts than ``reply``, too; those are `Raw`."""
    may_be_empty: bool = False
    """True where front-ends send no payload although there is one; it is `Nothing` then."""
    replies_in_postcopy: bool = False
    """True where postcopy gives it an own reply, of its own layout (vhost-user: Migration, postcopy)."""
    given: tuple[ProtocolFeature, Rule] | None = None
    """The rule that holds instead once a protocol feature is negotiated."""

    def under(self, features: ProtocolFeature) -> Rule:
        """Return the rule that holds with these protocol features negotiated."""
        if self.given is not None and self.given[0] in features:
            return self.given[1]
        return self

    def in_postcopy(self, size: int) -> Rule:
        """Return the rule that holds for a payload of ``size`` bytes after POSTCOPY_LISTEN."""
        if not self.replies_in_postcopy:
            return self
        return POSTCOPY_DONE if size == U64.LAYOUT.size else replace(self, reply=self.payload)

    def check_values(self, payload: Payload) -> None:
        """Raise `Violation` when a field of ``payload`` has a value that it may not have."""
        for name, legal in (self.values or {}).items():
            value = getattr(payload, name, None)
            if value is not None and value not in legal:
                raise Violation(f"{name} may not be {value}")


UNKNOWN: Final = Rule(Raw, fds=Fds.ANY)
"""The rule of a request that is in no table."""

POSTCOPY_DONE: Final = Rule(U64, values={"value": (0,)})
"""The second SET_MEM_TABLE, or last ADD_MEM_REG, of postcopy: its eight zero bytes say that the replies were read."""

_Feature = ProtocolFeature
_Req = FrontendRequest
_SWITCH: Final[Values] = {"num": range(2)}
_SIZE: Final[Values] = {"num": range(1, 32768 + 1)}
_BYTE: Final[Values] = {"value": range(256)}
_WRITABLE: Final[Values] = {"flags": range(2)}
_UPDATES: Final[Values] = {"type": (IotlbType.UPDATE, IotlbType.INVALIDATE), "perm": range(4)}
_MISSES: Final[Values] = {"type": (IotlbType.MISS, IotlbType.ACCESS_FAIL), "perm": range(4)}
_SLOTS: Final = _Feature.CONFIGURE_MEM_SLOTS
_REGION: Final = Rule(SingleRegion, fds=Fds.ONE, needs=_SLOTS, replies_in_postcopy=True)
_OLD_REGION: Final = Rule(SingleRegion, fds=Fds.UNWANTED, needs=_SLOTS)  # libblkio attaches the descriptor again
_TABLE: Final = Rule(MemoryTable, fds=Fds.ONE_PER_REGION, replies_in_postcopy=True)

FRONTEND_RULES: Final[Mapping[FrontendRequest, Rule]] = {
    _Req.GET_FEATURES: Rule(reply=U64),
    _Req.SET_FEATURES: Rule(U64),
    _Req.SET_OWNER: Rule(),
    _Req.RESET_OWNER: Rule(),
    _Req.SET_MEM_TABLE: replace(_TABLE, given=(_Feature.XEN_MMAP, replace(_TABLE, payload=XenMemoryTable))),
    _Req.SET_LOG_BASE: Rule(U64, given=(_Feature.LOG_SHMFD, Rule(Log, reply=Log, fds=Fds.ONE, any_reply=True))),
    _Req.SET_LOG_FD: Rule(fds=Fds.ONE),
    _Req.SET_VRING_NUM: Rule(VringState, values=_SIZE),
    _Req.SET_VRING_ADDR: Rule(VringAddr, values={"flags": range(2)}),
    _Req.SET_VRING_BASE: Rule(VringState),
    _Req.GET_VRING_BASE: Rule(VringState, reply=VringState),
    _Req.SET_VRING_KICK: Rule(VringFd, fds=Fds.UNLESS_NO_FD),
    _Req.SET_VRING_CALL: Rule(VringFd, fds=Fds.UNLESS_NO_FD),
    _Req.SET_VRING_ERR: Rule(VringFd, fds=Fds.UNLESS_NO_FD),
    _Req.GET_PROTOCOL_FEATURES: Rule(reply=U64, needs_offered=F_PROTOCOL_FEATURES),
    _Req.SET_PROTOCOL_FEATURES: Rule(U64, needs_offered=F_PROTOCOL_FEATURES),
    _Req.GET_QUEUE_NUM: Rule(reply=U64, needs=_Feature.MQ, lenient=True),  # SPDK asks in any case
    _Req.SET_VRING_ENABLE: Rule(
        VringState, needs_offered=F_PROTOCOL_FEATURES, needs_acked=F_PROTOCOL_FEATURES, lenient=True, values=_SWITCH
    ),  # crosvm may leave out SET_FEATURES
    _Req.SEND_RARP: Rule(U64, needs=_Feature.RARP),
    _Req.NET_SET_MTU: Rule(U64, needs=_Feature.MTU),
    _Req.SET_BACKEND_REQ_FD: Rule(fds=Fds.ONE, needs=_Feature.BACKEND_REQ),
    _Req.IOTLB_MSG: Rule(Iotlb, reply=U64, needs_acked=F_ACCESS_PLATFORM, values=_UPDATES, failure=U64),
    _Req.SET_VRING_ENDIAN: Rule(VringState, needs=_Feature.CROSS_ENDIAN, values=_SWITCH),
    _Req.GET_CONFIG: Rule(Config, reply=Config, needs=_Feature.CONFIG, failure=lambda code: Config(0, 0, 0, b"")),
    _Req.SET_CONFIG: Rule(Config, needs=_Feature.CONFIG),
    _Req.CREATE_CRYPTO_SESSION: Rule(Raw, reply=Raw, needs=_Feature.CRYPTO_SESSION),
    _Req.CLOSE_CRYPTO_SESSION: Rule(U64, needs=_Feature.CRYPTO_SESSION),
    _Req.POSTCOPY_ADVISE: Rule(
        reply=Nothing, reply_fds=Fds.AT_MOST_ONE, needs=_Feature.PAGEFAULT, failure=lambda code: Nothing()
    ),
    _Req.POSTCOPY_LISTEN: Rule(needs=_Feature.PAGEFAULT),
    _Req.POSTCOPY_END: Rule(reply=U64, needs=_Feature.PAGEFAULT, failure=U64),
    _Req.GET_INFLIGHT_FD: Rule(
        Inflight,
        reply=Inflight,
        reply_fds=Fds.UNLESS_EMPTY,
        needs=_Feature.INFLIGHT_SHMFD,
        failure=lambda code: Inflight(0, 0, 0, 0),
    ),
    _Req.SET_INFLIGHT_FD: Rule(Inflight, fds=Fds.ONE, needs=_Feature.INFLIGHT_SHMFD),
    _Req.GPU_SET_SOCKET: Rule(fds=Fds.ONE),
    _Req.RESET_DEVICE: Rule(needs=_Feature.RESET_DEVICE),
    _Req.VRING_KICK: Rule(VringState, needs=_Feature.INBAND_NOTIFICATIONS),
    _Req.GET_MAX_MEM_SLOTS: Rule(reply=U64, needs=_SLOTS),
    _Req.ADD_MEM_REG: replace(_REGION, given=(_Feature.XEN_MMAP, replace(_REGION, payload=XenSingleRegion))),
    _Req.REM_MEM_REG: replace(_OLD_REGION, given=(_Feature.XEN_MMAP, replace(_OLD_REGION, payload=XenSingleRegion))),
    _Req.SET_STATUS: Rule(U64, needs=_Feature.STATUS, values=_BYTE),
    _Req.GET_STATUS: Rule(reply=U64, needs=_Feature.STATUS),
    _Req.GET_SHARED_OBJECT: Rule(
        SharedObject,
        reply=Nothing,
        reply_fds=Fds.AT_MOST_ONE,
        needs=_Feature.SHARED_OBJECT,
        failure=lambda code: Nothing(),
        may_be_empty=True,
    ),  # QEMU says that the UUID has no bytes
    _Req.SET_DEVICE_STATE_FD: Rule(
        DeviceStateParams,
        reply=DeviceStateReply,
        fds=Fds.ONE,
        reply_fds=Fds.UNLESS_NO_FD,
        needs=_Feature.DEVICE_STATE,
        values={"direction": tuple(Direction), "phase": tuple(Phase)},
        failure=DeviceStateReply.of,
    ),
    _Req.CHECK_DEVICE_STATE: Rule(reply=U64, needs=_Feature.DEVICE_STATE, failure=U64),
    _Req.GET_SHMEM_CONFIG: Rule(reply=ShmemConfig, needs=_Feature.SHMEM),
    _Req.GET_VRING_BASE_SKIP_DRAIN: Rule(VringState, reply=VringState, needs=_Feature.GET_VRING_BASE_SKIP_DRAIN),
}
"""vhost-user: Front-end message types."""

BACKEND_RULES: Final[Mapping[BackendRequest, Rule]] = {
    BackendRequest.IOTLB_MSG: Rule(Iotlb, needs_acked=F_ACCESS_PLATFORM, values=_MISSES),
    BackendRequest.CONFIG_CHANGE_MSG: Rule(needs=_Feature.CONFIG),
    BackendRequest.VRING_HOST_NOTIFIER_MSG: Rule(VringArea, fds=Fds.UNLESS_NO_FD, needs=_Feature.HOST_NOTIFIER),
    BackendRequest.VRING_CALL: Rule(VringState, needs=_Feature.INBAND_NOTIFICATIONS),
    BackendRequest.VRING_ERR: Rule(VringState, needs=_Feature.INBAND_NOTIFICATIONS),
    BackendRequest.SHARED_OBJECT_ADD: Rule(SharedObject, needs=_Feature.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_REMOVE: Rule(SharedObject, needs=_Feature.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_LOOKUP: Rule(
        SharedObject, reply=U64, reply_fds=Fds.AT_MOST_ONE, needs=_Feature.SHARED_OBJECT, failure=U64
    ),
    BackendRequest.SHMEM_MAP: Rule(ShmemMmap, fds=Fds.ONE, needs=_Feature.SHMEM, values=_WRITABLE),
    BackendRequest.SHMEM_UNMAP: Rule(ShmemMmap, needs=_Feature.SHMEM),
}
"""vhost-user: Back-end message types."""


def rule_of(request: int) -> Rule:
    """Return the line of the table for a member of either enumeration, and `UNKNOWN` for any other number."""
    if isinstance(request, FrontendRequest):
        return FRONTEND_RULES[request]
    if isinstance(request, BackendRequest):
        return BACKEND_RULES[request]
    return UNKNOWN
