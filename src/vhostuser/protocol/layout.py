"""What every payload is made of: `Violation`, `Payload` and `Fixed`. Touches nothing."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from struct import Struct
from typing import ClassVar, Self

from vhostuser.errors import ProtocolError


class Violation(ProtocolError):  # noqa: N818  the name of the style guide; it is always turned into an ...Error
    """A rule is broken; who broke it is known further out, where it becomes Local or Remote."""


@dataclass(frozen=True, slots=True)
class Payload(ABC):
    """What every payload can do."""

    @abstractmethod
    def pack(self) -> bytes:
        """Return the bytes on the wire. Raises `Violation` for a value that does not fit its field."""

    @classmethod
    @abstractmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read the bytes of one whole payload. Raises `Violation` when they are not one."""


@dataclass(frozen=True, slots=True)
class Fixed(Payload):
    """A payload packed field after field as ``LAYOUT`` says, in native byte order."""

    LAYOUT: ClassVar[Struct]
    USEFUL: ClassVar[int] = 0  # bytes that must be there when tail padding may be missing; 0: all of them

    def pack(self) -> bytes:
        try:
            return self.LAYOUT.pack(*(getattr(self, field.name) for field in fields(self)))
        except struct.error as error:
            raise Violation(f"{type(self).__name__}: {error}") from error

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        size = cls.LAYOUT.size
        if not (cls.USEFUL or size) <= len(payload) <= size:
            raise Violation(f"{cls.__name__} is {size} bytes, not {len(payload)}")
        return cls(*cls.LAYOUT.unpack(payload.ljust(size, b"\0")))
