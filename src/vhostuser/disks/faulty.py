"""A disk made slow and unreliable on purpose, for people who test guests. Touches the disk it wraps."""

from __future__ import annotations

import errno
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

from vhostuser.disks.disk import Limits, NativeDisk
from vhostuser.errors import UsageError

if TYPE_CHECKING:
    from vhostuser._native import EngineSpec
    from vhostuser.disks.custody import Holding, Takeover
    from vhostuser.disks.disk import Disk

UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Faults:
    """How slow, and how unreliable. Each request is held for 0.5 to 1.5 times its delay."""

    delay_read_s: float = 0.0
    delay_write_s: float = 0.0
    """Also for discards and zeroes."""
    delay_flush_s: float = 0.0
    error_read: float = 0.0
    """The share of reads, 0..1, that fail."""
    error_write: float = 0.0
    """The share of writes, discards and zeroes that fail and store nothing."""
    error_flush: float = 0.0
    errno: int = errno.EIO
    """What they fail with."""
    error_limit: int | None = None
    """So many requests fail, then storage is well again; None: no end."""
    seed: int = 0
    """Equal seeds fail equal requests."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a text like ``delay-read=5ms,error-write=0.01,errno=ENOSPC,error-limit=10,seed=7``.

        Delays are in ``us``, ``ms`` or ``s``, shares are fractions or per cent (``1%``). Raises `UsageError`.
        """
        faults: dict[str, float | int | None] = {}
        for part in text.split(","):
            key, equals, value = part.strip().partition("=")
            name = key.replace("-", "_")
            try:
                if not equals:
                    raise ValueError("has no value")
                if name in ("delay_read", "delay_write", "delay_flush"):
                    faults[f"{name}_s"] = _seconds(value)
                elif name in ("error_read", "error_write", "error_flush"):
                    faults[name] = _share(value)
                elif name == "seed":
                    faults[name] = int(value)
                elif name == "errno":
                    faults[name] = _errno(value)
                elif name == "error_limit":
                    faults[name] = _count(value)
                else:
                    raise ValueError("is not known")
            except ValueError as error:
                raise UsageError(
                    f"inject {part.strip()!r}",
                    str(error),
                    "Use delay-read, delay-write, delay-flush (like 5ms), error-read, error-write, error-flush "
                    "(like 0.01 or 1%), errno (like ENOSPC), error-limit (a number) or seed, separated by commas",
                ) from None
        return cls(**faults)  # type: ignore[arg-type]


class FaultyDisk(NativeDisk):
    """The same storage as ``disk``, which it owns, with ``faults``."""

    def __init__(self, disk: Disk, faults: Faults) -> None:
        """Raises `UsageError` when the disk has no native engine to make faulty."""
        inner = disk.engine()
        if inner is None:
            raise UsageError(disk.name, "faults are made by native engines only", "Inject them into another disk")
        self._disk = disk
        self._engine: EngineSpec | None = inner.with_faults(**asdict(faults))
        self.capabilities = disk.capabilities
        self.writeback = disk.writeback
        self.volatile = disk.volatile
        self.fenced = disk.fenced

    @property
    def name(self) -> str:
        """The name of the disk below."""
        return self._disk.name

    @property
    def limits(self) -> Limits:
        """The limits of the disk below."""
        return self._disk.limits

    def engine(self) -> EngineSpec:
        """The engine of the disk below, with faults. Raises `ValueError` when the disk is closed."""
        if self._engine is None:
            raise ValueError(f"{self.name} is closed")
        return self._engine

    def flush(self) -> None:
        """Flush the disk below."""
        self._disk.flush()

    def refresh(self) -> int:
        """Refresh the disk below."""
        return self._disk.refresh()

    def resize(self, size: int) -> None:
        """Resize the disk below."""
        self._disk.resize(size)

    @property
    def holding(self) -> Holding:
        """Whose the disk below is."""
        return self._disk.holding

    def activate(self) -> Takeover | None:
        """Have the disk below."""
        return self._disk.activate()

    def deactivate(self, *, unused: bool = False) -> None:
        """The disk below is not used for now."""
        self._disk.deactivate(unused=unused)

    def look_for_heir(self) -> bool:
        """Let go of the disk below if it is waited for."""
        return self._disk.look_for_heir()

    def note_write_cache(self, *, on: bool) -> None:
        """Keep it with the disk below."""
        self._disk.note_write_cache(on=on)

    def close(self) -> None:
        """Close the disk below."""
        self._engine = None
        self._disk.close()


def _seconds(text: str) -> float:
    for unit, factor in UNITS_S.items():
        if text.endswith(unit) and text[: -len(unit)].replace(".", "", 1).isdecimal():
            return float(text[: -len(unit)]) * factor
    raise ValueError("is not a time")


def _share(text: str) -> float:
    number = text.removesuffix("%")
    if not number.replace(".", "", 1).isdecimal():
        raise ValueError("is not a share")
    share = float(number) / (100 if text.endswith("%") else 1)
    if share > 1:
        raise ValueError("is more than all requests")
    return share


def _errno(text: str) -> int:
    number = {name: number for number, name in errno.errorcode.items()}.get(text.upper())
    if number is None:
        raise ValueError("is not the name of an error")
    return number


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise ValueError("is not a number of requests")
    return int(text)
