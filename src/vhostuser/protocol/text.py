"""Renders what travels on a connection as one line of text, for logs and traces. Touches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import IntEnum, IntFlag
from typing import Final

from vhostuser.protocol.device_state import DeviceStateParams, DeviceStateReply, Direction, Phase
from vhostuser.protocol.ids import F_LOG_ALL, F_PROTOCOL_FEATURES, BackendRequest, FrontendRequest, ProtocolFeature
from vhostuser.protocol.layout import Payload
from vhostuser.protocol.messages import Message, Refused, Reply, name_of
from vhostuser.protocol.negotiation import names
from vhostuser.protocol.payloads import (
    NO_FD,
    U64,
    Config,
    Iotlb,
    IotlbPerm,
    IotlbType,
    MemoryRegion,
    MemoryTable,
    Raw,
    SharedObject,
    ShmemConfig,
    ShmemFlag,
    ShmemMmap,
    SingleRegion,
    VringAddr,
    VringArea,
    VringFd,
    VringFlag,
    XenFlag,
    XenMemoryRegion,
)
from vhostuser.virtio.features import feature_names
from vhostuser.virtio.status import DeviceStatus

SHOWN_BYTES: Final = 64
"""Longer data is cut off in the text."""

_NAMED: Final[Mapping[tuple[type[Payload], str], type[IntEnum] | type[IntFlag]]] = {
    (VringAddr, "flags"): VringFlag,
    (Iotlb, "perm"): IotlbPerm,
    (Iotlb, "type"): IotlbType,
    (DeviceStateParams, "direction"): Direction,
    (DeviceStateParams, "phase"): Phase,
    (ShmemMmap, "flags"): ShmemFlag,
    (XenMemoryRegion, "xen_flags"): XenFlag,
}
_DECIMAL: Final = frozenset({"index", "num", "num_queues", "queue_size", "domid", "shmid", "nregions"})
_COUNTS: Final = frozenset(
    {FrontendRequest.GET_QUEUE_NUM, FrontendRequest.GET_MAX_MEM_SLOTS, FrontendRequest.NET_SET_MTU}
)
_RESULTS: Final = frozenset(
    {FrontendRequest.IOTLB_MSG, FrontendRequest.POSTCOPY_END, FrontendRequest.CHECK_DEVICE_STATE}
)


def describe(event: Message[object] | Reply[object] | Refused, device: type[IntFlag] | None = None) -> str:
    """Return one line that says everything about ``event``; ``device`` names the feature bits of the device type."""
    name = name_of(event.request)
    if isinstance(event, Refused):
        asked = " need_reply" if event.need_reply else ""
        return f"refused {name} of {event.size} bytes{asked}: {event.reason}"
    if isinstance(event, Reply) and event.ack:
        return f"ack {name} {_result(event.payload)}"
    words = ["reply", name] if isinstance(event, Reply) else [name]
    words += _payload(event.request, event.payload, device)
    if event.fds:
        words.append(f"{len(event.fds)} fd{'s' if len(event.fds) > 1 else ''}")
    if isinstance(event, Message) and event.need_reply:
        words.append("need_reply")
    return " ".join(words)


def _payload(request: int, payload: Payload, device: type[IntFlag] | None) -> list[str]:
    match payload:
        case DeviceStateReply():
            return [_result(U64(payload.error)), *(["no_fd"] if payload.value & NO_FD else [])]
        case U64(value):
            return [_number(request, value, device)]
        case VringFd() | VringArea():
            words = [f"index={payload.index}", *(["no_fd"] if payload.no_fd else [])]
            return words + (_fields(payload)[1:] if isinstance(payload, VringArea) else [])
        case MemoryTable(regions):
            return [f"{len(regions)} region{'' if len(regions) == 1 else 's'}", *map(_region, regions)]
        case SingleRegion(region):
            return [_region(region)]
        case Config():
            return [f"offset={payload.offset} size={payload.size} flags={payload.flags:#x}", *_bytes(payload.data)]
        case SharedObject(uuid):
            return [f"uuid={_uuid(uuid)}"]
        case ShmemConfig(nregions, sizes):
            return [f"nregions={nregions}", *(f"{shmid}:{size:#x}" for shmid, size in enumerate(sizes) if size)]
        case Raw(data):
            return [f"{len(data)} bytes", *_bytes(data)]
    return _fields(payload)


def _number(request: int, value: int, device: type[IntFlag] | None) -> str:
    """Render a `U64`, whose meaning depends on the request."""
    match request:
        case BackendRequest():
            return _result(U64(value))
        case FrontendRequest.GET_FEATURES | FrontendRequest.SET_FEATURES:
            return f"{value:#x} ({_feature_names(value, device)})"
        case FrontendRequest.GET_PROTOCOL_FEATURES | FrontendRequest.SET_PROTOCOL_FEATURES:
            return f"{value:#x} ({names(ProtocolFeature(value)) or 'none'})"
        case FrontendRequest.GET_STATUS | FrontendRequest.SET_STATUS:
            return f"{value:#x} ({_flag_names(DeviceStatus, value)})"
        case FrontendRequest.SEND_RARP:
            return f"mac={U64(value).pack()[:6].hex(':')}"
    if request in _RESULTS:
        return _result(U64(value))
    return str(value) if request in _COUNTS else f"{value:#x}"


def _result(payload: Payload) -> str:
    match payload:
        case U64(0):
            return "ok"
        case U64(code):
            return f"failed with {code}"
    return "failed"


def _feature_names(value: int, device: type[IntFlag] | None) -> str:
    known = {f"bit {bit.bit_length() - 1}": name for bit, name in _PROTOCOL_BITS.items()}
    return " ".join(known.get(name, name) for name in feature_names(value, device)) or "none"


_PROTOCOL_BITS: Final[Mapping[int, str]] = {F_LOG_ALL: "LOG_ALL", F_PROTOCOL_FEATURES: "PROTOCOL_FEATURES"}


def _region(region: MemoryRegion) -> str:
    return f"[{' '.join(_fields(region))}]"


def _fields(payload: Payload) -> list[str]:
    """Render each field under its name: counts in decimal, addresses and sizes in hexadecimal."""
    words = []
    for field in fields(payload):
        value = getattr(payload, field.name)
        kind = _NAMED.get((type(payload), field.name))
        if kind is not None:
            words.append(f"{field.name}={_flag_names(kind, value)}")
        else:
            words.append(f"{field.name}={value}" if field.name in _DECIMAL else f"{field.name}={value:#x}")
    return words


def _flag_names(kind: type[IntEnum] | type[IntFlag], value: int) -> str:
    """Return the names of a flag set or of one choice; what has none is shown as a number."""
    if issubclass(kind, IntEnum):
        return next((member.name for member in kind if member == value), str(value))
    known = [str(member.name) for member in kind if value & member]
    unknown = value & ~sum(kind)
    return "|".join(known + ([f"{unknown:#x}"] if unknown else [])) or "0"


def _bytes(data: bytes) -> list[str]:
    if not data:
        return []
    return [f"data={data[:SHOWN_BYTES].hex()}{'...' if len(data) > SHOWN_BYTES else ''}"]


def _uuid(data: bytes) -> str:
    """As `uuid.UUID` writes it, whose module takes long to import."""
    digits = data.hex()
    if len(data) != 16:
        return digits
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
