"""What the messages about one ring add up to. Pure: touches nothing.

A front-end describes a ring in several messages, in almost any order, and starts it with the last of them.
`RingState` holds the two bits of the specification, `RingPlan` the description. Neither knows whether the ring really
runs: that is the session's to know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, Generic, Self, TypeVar

if TYPE_CHECKING:
    from vhostuser.protocol import VringAddr

F = TypeVar("F")
"""A descriptor, whatever stands for it."""


class RingEvent(Enum):
    """What may happen to a ring (vhost-user: Ring states)."""

    KICK = auto()
    """SET_VRING_KICK, with a descriptor or without."""
    GET_BASE = auto()
    """GET_VRING_BASE."""
    ENABLE = auto()
    DISABLE = auto()
    NO_PROTOCOL_FEATURES = auto()
    """SET_FEATURES without VHOST_USER_F_PROTOCOL_FEATURES: SET_VRING_ENABLE will not come."""
    RESET = auto()
    """RESET_DEVICE, or SET_STATUS 0."""


STARTS: Final = {RingEvent.KICK: True, RingEvent.GET_BASE: False, RingEvent.RESET: False}
ENABLES: Final = {
    RingEvent.ENABLE: True,
    RingEvent.NO_PROTOCOL_FEATURES: True,
    RingEvent.DISABLE: False,
    RingEvent.RESET: False,
}


@dataclass(frozen=True, slots=True)
class RingState:
    """Two independent bits (vhost-user: Ring states); an absent event changes neither."""

    started: bool = False
    enabled: bool = False

    def after(self, event: RingEvent) -> Self:
        """The state once ``event`` has happened."""
        return type(self)(STARTS.get(event, self.started), ENABLES.get(event, self.enabled))


@dataclass(frozen=True, slots=True)
class RingPlan(Generic[F]):
    """How one ring is to be set up, as far as the front-end has told."""

    num: int | None = None
    """Entries of the ring (SET_VRING_NUM)."""
    addr: VringAddr | None = None
    """Where it lies (SET_VRING_ADDR)."""
    base: int = 0
    """The next entry to take (SET_VRING_BASE); a front-end that says nothing means 0."""
    kicked: bool = False
    """SET_VRING_KICK has come."""
    kick: F | None = None
    """What the front-end kicks; None before SET_VRING_KICK, and after it when the ring is to be polled."""
    call: F | None = None
    """What the back-end calls; optional, replaced at any time."""
    err: F | None = None
    """What tells the front-end that the ring is broken; optional, replaced at any time."""

    def missing(self, *, memory: bool) -> tuple[str, ...]:
        """The requests that still have to come before the ring can run; ``memory`` says whether any memory is known."""
        parts = (
            ("SET_VRING_NUM", self.num is not None),
            ("SET_VRING_ADDR", self.addr is not None),
            ("SET_VRING_KICK", self.kicked),
            ("SET_MEM_TABLE", memory),
        )
        return tuple(name for name, there in parts if not there)

    def stopped(self, base: int) -> Self:
        """The plan after a stop at ``base``: another SET_VRING_KICK is needed. CALL and ERR stay as they are."""
        return replace(self, base=base, kicked=False, kick=None)

    def reset(self) -> Self:
        """The plan of a device that was reset. CALL and ERR belong to the connection and stay: QEMU sends them at
        connect and relies on them later."""
        return type(self)(call=self.call, err=self.err)
