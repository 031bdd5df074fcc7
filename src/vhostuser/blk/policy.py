"""What becomes of requests that storage fails, and how many a second are taken. Touches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from vhostuser.disks.registry import parse_size
from vhostuser.errors import UsageError

MAX_RATE: Final = (1 << 63) - 1
"""The highest limit, a second."""

_ADVICE: Final = "Use iops=N, bps=N or both, separated by commas, like iops=500,bps=20M; none for no limit"


class ErrorAction(StrEnum):
    """What becomes of a request that storage fails."""

    REPORT = "report"
    """The guest is told."""
    RETRY = "retry"
    """It is submitted again, after pauses of 0.1 s that double up to 10 s."""
    HOLD = "hold"
    """It is kept until the operator decides, or until the guest stops the queue and has waited long enough."""


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """What becomes of the requests that storage fails.

    Reads, writes, discards and zeroes obey it. A FLUSH, and a write that failed while the page cache was synced, are
    always reported: the kernel has dropped its dirty pages then, and a repetition would succeed without them.
    """

    on_error: ErrorAction = ErrorAction.REPORT
    on_enospc: ErrorAction = ErrorAction.REPORT
    """Where storage has no room left (ENOSPC, EDQUOT); ``on_error`` is for all other errors."""
    retry_for_s: float | None = None
    """How long after its first failure a request is tried again before the guest is told; None: for ever."""

    def check(self) -> None:
        """Raise `UsageError` for a time that makes no sense."""
        if self.retry_for_s is not None and not 0 < self.retry_for_s <= 365 * 86400:
            raise UsageError(
                f"retry-for {self.retry_for_s:g}", "it must be more than 0 s and at most a year", "Choose another time"
            )

    @property
    def keeps(self) -> bool:
        """Whether any failed request may be kept."""
        return (self.on_error, self.on_enospc) != (ErrorAction.REPORT, ErrorAction.REPORT)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How much a disk takes a second, over all its queues. 0: as much as comes.

    After a rest, what the limit allows in a tenth of a second is taken at once.
    """

    iops: int = 0
    """Requests of any type."""
    bps: int = 0
    """Bytes of reads and writes. A request larger than the burst is taken, and those after it wait for longer."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for a number out of range."""
        for name, value in (("iops", self.iops), ("bps", self.bps)):
            if not 0 <= value <= MAX_RATE:
                raise UsageError(f"rate limit {name}={value}", f"it must be 0 to {MAX_RATE}", "Choose another number")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a text like ``iops=500,bps=20M``, or ``none``. Suffixes are powers of 1024. Raises `UsageError`."""
        if text.strip() == "none":
            return cls()
        rates: dict[str, int] = {}
        for part in text.split(","):
            key, equals, value = (word.strip() for word in part.partition("="))
            if not equals or key not in ("iops", "bps"):
                raise UsageError(f"rate limit {part.strip()!r}", "this is no limit", _ADVICE)
            if key in rates:
                raise UsageError(f"rate limit {text!r}", f"{key} is there twice", _ADVICE)
            rates[key] = parse_size(value)
        return cls(**rates)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        parts = [f"{name}={value}" for name, value in (("iops", self.iops), ("bps", self.bps)) if value]
        return ",".join(parts) or "none"
