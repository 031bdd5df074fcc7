"""Whose an image is at the moment, when one server hands it over to another. Touches the locks of the image.

Both servers have the image open. The one that waits (``serve --incoming``) says so with a lock byte. The one that has
it lets go of its locks when it uses the image no longer and somebody waits; it takes them again when it has to go on
itself. Nothing else is exchanged: whoever holds the locks has the image, and a process that ends holds none.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Final

from vhostuser.disks.locks import (
    CACHE_OFF,
    CLAIMED,
    GIVEN,
    HEIR,
    LENDER,
    Patience,
    announce_heir,
    drop,
    hold,
    lock_image,
    taken,
    unlock_image,
)
from vhostuser.errors import OperatorError

log = logging.getLogger(__name__)


class Holding(Enum):
    """Whose an image is."""

    HELD = "held"
    """Ours."""
    WAITING = "waiting"
    """Another server's, or nobody's yet; it is ours when our first ring starts."""
    LENT = "lent"
    """It was ours, and another server waited for it."""


ADVICE: Final = {
    Holding.WAITING: "The other server lets go of it once all its rings have stopped: stop that guest first",
    Holding.LENT: "Go on where it was handed over to, or stop that server first",
}
CAUSE: Final = {
    Holding.WAITING: "it is not handed over",
    Holding.LENT: "it was handed over to another server",
}


@dataclass(frozen=True, slots=True)
class Takeover:
    """What is known of the server before."""

    cache_off: bool
    """Its guest had its write cache off."""


class Custody:
    """The locks of an image that this process writes, and when it has them.

    `take`, `give` and `note_cache` are for the thread that starts and stops rings, `look` for another one.
    """

    def __init__(
        self, fd: int, path: str, *, incoming: bool, patience: Patience, timeout_s: float, place: str = "",
        flush: Callable[[], None],
    ) -> None:  # fmt: skip
        """Lock the image behind ``fd``, which stays the caller's; with ``incoming`` only say that we wait for it.

        ``patience``: how long to try now; ``timeout_s``: how long to try when the image is needed. ``place``: what it
        is served on, if anything. ``flush`` puts on stable storage what was written; it raises `OSError`. Raises
        `OperatorError`.
        """
        self._fd = fd
        self._path = path
        self._timeout_s = timeout_s
        self._place = place
        self._flush = flush
        self._lock = threading.Lock()
        self._used = False
        self._stuck = False
        self._cache_off = False
        self._before: Holding | None = None
        self._offered = False
        if incoming:
            announce_heir(fd, path, patience)
            self._holding = Holding.WAITING
            log.info("%s: waiting for it: it is taken over when the first ring starts", path)
        else:
            lock_image(fd, path, writable=True, patience=patience, place=place)
            self._holding = Holding.HELD

    @property
    def holding(self) -> Holding:
        """Whose the image is. Any thread."""
        return self._holding

    def take(self) -> Takeover | None:
        """Have the image before it is used; None when we had it all the time.

        Blocks until whoever has it lets go of it, for the time that was set. Raises `OperatorError`.
        """
        with self._lock:
            if self._holding is Holding.HELD:
                self._used, self._before = True, None
                self._offer()
                return None
            patience = Patience(self._path, self._timeout_s)
            heir = self._holding is Holding.WAITING
            try:
                lock_image(self._fd, self._path, writable=True, patience=patience, place=self._place, heir=heir)
            except OperatorError as error:
                cause = f"{CAUSE[self._holding]}: {error.cause}"
                raise OperatorError(self._path, cause, ADVICE[self._holding]) from error
            before = Takeover(taken(self._fd, CACHE_OFF))
            log.info("%s: taken %s", self._path, "over" if heir else "again")
            self._holding, self._used, self._before = Holding.HELD, True, self._holding
            self._show_cache()
            self._offer()
            drop(self._fd, HEIR)
            drop(self._fd, GIVEN)
            # Another machine may have written what this one keeps in its memory from a time before.
            with suppress(OSError):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return before

    def give(self, *, unused: bool = False) -> None:
        """The image is used no longer: let go of it if somebody waits. Blocks while what was written is stored.

        ``unused``: undo the `take` before, if it changed anything.
        """
        with self._lock:
            self._used = False
            if unused and self._before is not None:
                self._undo(self._before)
            self._lend()

    def look(self) -> bool:
        """Let go of an image that is not used if somebody waits by now. Does not wait for a `take` or `give`.

        Returns whether there may be something to do later, although nobody calls `take` or `give`.
        """
        if not self._lock.acquire(blocking=False):
            return True
        try:
            self._offer()
            if not self._used:
                self._lend()
            if self._holding is Holding.LENT and taken(self._fd, LENDER):
                drop(self._fd, CACHE_OFF)  # who has the image by now has seen it, and shows its own
                drop(self._fd, GIVEN)
                return False
            return not self._used and self._holding is not Holding.WAITING
        finally:
            self._lock.release()

    def note_cache(self, *, off: bool) -> None:
        """Tell whoever comes after us that our guest has its write cache off, or on."""
        with self._lock:
            self._cache_off = off
            self._show_cache()

    def _show_cache(self) -> None:
        if self._holding is not Holding.HELD:
            return
        if self._cache_off:
            hold(self._fd, CACHE_OFF)
        else:
            drop(self._fd, CACHE_OFF)

    def _offer(self) -> None:
        """Say that we would hand the image over: only programs that serve it ever do."""
        if self._holding is Holding.HELD and not self._offered:
            self._offered = hold(self._fd, LENDER)

    def _withdraw(self) -> None:
        drop(self._fd, LENDER)
        self._offered = False

    def _undo(self, before: Holding) -> None:
        self._before = None
        if before is Holding.WAITING and not hold(self._fd, HEIR, exclusive=True):
            return  # yet another one waits: it is treated as any other
        self._holding = before
        waiting = before is Holding.WAITING
        self._withdraw()
        if waiting:
            drop(self._fd, CACHE_OFF)
        else:
            hold(self._fd, GIVEN)
        unlock_image(self._fd, but=CLAIMED if waiting else ())

    def _lend(self) -> None:
        if self._holding is not Holding.HELD or self._stuck or not taken(self._fd, HEIR):
            return
        try:
            self._flush()
        except OSError as error:
            self._stuck = True
            cause = os.strerror(error.errno or 0)
            log.error("%s: not handed over: what was written cannot be stored (%s)", self._path, cause)
            return
        self._holding = Holding.LENT
        hold(self._fd, GIVEN)
        self._withdraw()
        unlock_image(self._fd)
        log.info("%s: handed over to the server that waits for it", self._path)
