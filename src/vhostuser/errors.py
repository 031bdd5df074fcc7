"""The error tree: every class says whose fault it was. Touches nothing."""

from __future__ import annotations


class VhostUserError(Exception):
    """Any failure this package reports on purpose."""


class ProtocolError(VhostUserError):
    """A rule of the vhost-user specification was broken."""


class LocalProtocolError(ProtocolError):
    """We asked for something forbidden. Nothing was sent; the connection is still good."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the specification. The connection is over and its received descriptors are closed."""


class PeerGone(VhostUserError, ConnectionError):
    """The peer closed the connection, or does not read or answer within the time limit."""


class SetupError(VhostUserError, ValueError):
    """A ring, queue or device cannot be set up, or is not in the state, as asked. Nothing was changed."""


class GuestMemoryError(VhostUserError, ValueError):
    """A memory table cannot be mapped, or an address lies outside of it."""


class RemoteRingError(VhostUserError):
    """The other half of a ring broke its rules: what it published cannot be true."""


class DrainTimeout(VhostUserError, TimeoutError):
    """Storage did not answer within the time limit; the operations are still running."""


class ConfigRefused(VhostUserError):
    """A write to the configuration space that the driver may not make."""


class OperatorError(VhostUserError):
    """Something a person asked for cannot be done; rendered as ``vhostuser: object: cause. advice``."""

    def __init__(self, subject: str, cause: str, advice: str) -> None:
        """``cause`` and ``advice`` are sentences without their full stop."""
        super().__init__(f"{subject}: {cause}. {advice}.")
        self.subject = subject
        self.cause = cause
        self.advice = advice


class UsageError(OperatorError):
    """What was asked for makes no sense as such; programs exit with 2."""
