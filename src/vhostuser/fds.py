"""One owner for one descriptor. Touches the descriptor it owns and nothing else."""

from __future__ import annotations

import os
import warnings
from types import TracebackType
from typing import ClassVar, Self


class Fd:
    """Owns one file descriptor: moved and never copied, closed exactly once.

    A forgotten one closes itself when it is collected. Not safe to close and use from two threads at once.
    """

    warn_when_forgotten: ClassVar[bool] = False
    """Tests set it: a descriptor that only the collector closes is a `ResourceWarning` then."""

    def __init__(self, number: int) -> None:
        """Takes over the descriptor ``number``. Raises `ValueError` when it cannot be one."""
        self._number = -1
        if number < 0:
            raise ValueError(f"{number} is no descriptor")
        self._number = number

    @property
    def closed(self) -> bool:
        """True once nothing is owned any more."""
        return self._number < 0

    def fileno(self) -> int:
        """Return the number, which stays owned here. Raises `ValueError` when it is closed."""
        if self._number < 0:
            raise ValueError("the descriptor is closed")
        return self._number

    def close(self) -> None:
        """Close the descriptor; does nothing the second time. An error of the last write, if any, is not reported."""
        number, self._number = self._number, -1
        if number >= 0:
            try:
                os.close(number)
            except OSError:  # it is closed all the same
                return

    def detach(self) -> int:
        """Return the number and give up owning it: the caller closes it. Raises `ValueError` when it is closed."""
        number = self.fileno()
        self._number = -1
        return number

    def duplicate(self) -> Fd:
        """Return another descriptor, close-on-exec, of the same open file. Raises `OSError` when there are too many."""
        return Fd(os.dup(self.fileno()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._number >= 0:
            if self.warn_when_forgotten:
                warnings.warn(f"{self!r} was forgotten", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return "Fd(closed)" if self.closed else f"Fd({self._number})"
