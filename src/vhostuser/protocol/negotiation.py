"""What the two ends have agreed on, as seen passing by, and what that allows. Touches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from vhostuser.protocol.ids import F_PROTOCOL_FEATURES, REQUIRED_WITH, FrontendRequest, ProtocolFeature
from vhostuser.protocol.layout import Payload, Violation
from vhostuser.protocol.payloads import U64
from vhostuser.protocol.rules import Rule

NOTHING = ProtocolFeature(0)


class Fatal(Violation):
    """A broken rule that no answer mends: the connection has to be closed."""


@dataclass(slots=True)
class Negotiation:
    """Shared by a main connection and its back-end channel; only the main connection changes it."""

    features_offered: int | None = None  # None: GET_FEATURES was not answered on this connection
    features: int = 0
    protocol_features_offered: ProtocolFeature | None = None
    protocol_features: ProtocolFeature = NOTHING
    postcopy: bool = False  # between POSTCOPY_LISTEN and POSTCOPY_END

    @classmethod
    def everything(cls) -> Self:
        """Return the state in which nothing is forbidden for want of a feature."""
        return cls(features=(1 << 64) - 1, protocol_features=ProtocolFeature((1 << len(ProtocolFeature)) - 1))

    def check_needs(self, rule: Rule, *, sending: bool) -> None:
        """Raise `Violation` when ``rule`` needs what is not negotiated.

        A receiver does not hold the peer to what it may have learned on an earlier connection.
        """
        offered = self.features_offered
        if offered is None:
            offered = 0 if sending else rule.needs_offered
        if missing := rule.needs_offered & ~offered:
            raise Violation(f"feature {_bits(missing)} is not offered")
        if rule.lenient and not sending:
            return
        if missing := rule.needs_acked & ~self.features:
            raise Violation(f"feature {_bits(missing)} is not negotiated")
        if lacking := rule.needs & ~self.protocol_features:
            raise Violation(f"protocol feature {names(lacking)} is not negotiated")

    def check_choice(self, request: int, payload: Payload, *, sending: bool) -> None:
        """Raise `Violation` when a front-end sets features that it may not set."""
        match request, payload:
            case FrontendRequest.SET_FEATURES, U64(value):
                if self.features_offered is not None and (extra := value & ~self.features_offered):
                    raise Violation(f"feature {_bits(extra)} was not offered")
            case FrontendRequest.SET_PROTOCOL_FEATURES, U64(value):
                chosen = ProtocolFeature(value)
                offered = self.protocol_features_offered
                # As numbers: the inverse of a flag knows none but the named bits.
                if offered is not None and (unasked := int(value) & ~int(offered)):
                    raise Violation(f"protocol feature {names(ProtocolFeature(unasked))} was not offered")
                self._check_dependencies(chosen, sending=sending)

    def _check_dependencies(self, chosen: ProtocolFeature, *, sending: bool) -> None:
        """A receiver insists on those of in-band notifications alone, where the specification makes it close."""
        for feature, others in REQUIRED_WITH.items():
            if feature in chosen and (lacking := others & ~chosen):
                reason = f"protocol feature {names(feature)} needs {names(lacking)}, too"
                if sending:
                    raise Violation(reason)
                if feature is ProtocolFeature.INBAND_NOTIFICATIONS:
                    raise Fatal(reason)

    def apply(self, request: int, payload: Payload) -> None:
        """Take note of a legal front-end request."""
        match request, payload:
            case FrontendRequest.SET_FEATURES, U64(value):
                self.features = value
            case FrontendRequest.SET_PROTOCOL_FEATURES, U64(value):
                self.protocol_features = ProtocolFeature(value)
            case FrontendRequest.POSTCOPY_LISTEN, _:
                self.postcopy = True
            case FrontendRequest.POSTCOPY_END, _:
                self.postcopy = False

    def answered(self, request: int, payload: Payload) -> None:
        """Take note of the own reply to a front-end request."""
        match request, payload:
            case FrontendRequest.GET_FEATURES, U64(value):
                self.features_offered = int(value)
            case FrontendRequest.GET_PROTOCOL_FEATURES, U64(value):
                self.protocol_features_offered = ProtocolFeature(value)

    def acks(self) -> bool:
        """Return whether NEED_REPLY means something."""
        return ProtocolFeature.REPLY_ACK in self.protocol_features

    def acks_with(self, request: int, payload: Payload) -> bool:
        """Return whether it will once ``request``, which may be the one that negotiates it, is applied."""
        match request, payload:
            case FrontendRequest.SET_PROTOCOL_FEATURES, U64(value):
                return ProtocolFeature.REPLY_ACK in ProtocolFeature(value)
        return self.acks()


def names(features: ProtocolFeature) -> str:
    """Return the names of the bits set, and the numbers of the bits without one."""
    known = [str(feature.name) for feature in ProtocolFeature if feature in features]
    unknown = int(features) & ~((1 << len(ProtocolFeature)) - 1)
    return " ".join(known + ([_bits(unknown)] if unknown else []))


def _bits(features: int) -> str:
    if features == F_PROTOCOL_FEATURES:
        return "PROTOCOL_FEATURES"
    bits = [str(bit) for bit in range(features.bit_length()) if features >> bit & 1]
    return f"bit {' '.join(bits)}"
