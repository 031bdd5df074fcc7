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


class BackendRefused(VhostUserError):
    """The back-end answered one message with a failure. The connection is still good."""

    def __init__(self, request: str, code: int | None = None) -> None:
        """``request`` is the name of the message; ``code`` what it was acknowledged with, if that is how it failed."""
        super().__init__(f"the back-end refused {request}" + (f" with code {code:#x}" if code is not None else ""))
        self.request = request
        self.code = code


class RequestRefused(VhostUserError, ValueError):
    """A request that the disk cannot take: out of its range, not whole blocks, not offered. Nothing was sent."""


class RequestFailed(VhostUserError, OSError):
    """The device answered a request with a status other than OK. ``errno`` says the same as ``status``."""

    def __init__(self, errno: int, cause: str, status: int, kind: int, sector: int) -> None:
        """``kind`` and ``sector`` are of the request as it was sent, ``status`` is the byte that came back."""
        super().__init__(errno, cause)
        self.status = status
        self.kind = kind
        self.sector = sector


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


class BackendUnfit(OperatorError):
    """A back-end that works, but cannot be driven: the text says what it lacks."""


class MigrationFailed(OperatorError):
    """A disk was not moved to another back-end: it stays behind the one it is at, and its requests go on there."""

    def __init__(self, subject: str, cause: str, advice: str, *, pages: tuple[int, ...] = ()) -> None:
        """``pages``: guest addresses of the pages that the back-end wrote and did not log, if that is why."""
        super().__init__(subject, cause, advice)
        self.pages = pages
