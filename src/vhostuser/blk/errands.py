"""What one thread lets another do, and waits for. Touches nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from vhostuser.errors import VhostUserError
from vhostuser.frontend.dialogue import again

T = TypeVar("T")


class Errands:
    """Handed in by any thread, run one after the other by the one that calls `run`; `refuse` ends that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._over: VhostUserError | None = None

    def hand_in(self, errand: Callable[[], T]) -> Future[T]:
        """The future of what ``errand`` returns. Raises what `refuse` was told."""
        future: Future[T] = Future()
        with self._lock:
            if self._over is not None:
                raise again(self._over)
            self._waiting.append((errand, future))
        return future

    def run(self) -> None:
        """Run those that wait."""
        for errand, future in self._taken():
            try:
                future.set_result(errand())
            except BaseException as error:  # it is told who waits
                future.set_exception(error)

    def refuse(self, error: VhostUserError) -> None:
        """Nothing is run any more, nor is what waits."""
        with self._lock:
            self._over = error
        for _, future in self._taken():
            future.set_exception(again(error))

    def _taken(self) -> list[tuple[Callable[[], Any], Future[Any]]]:
        with self._lock:
            taken, self._waiting = self._waiting, []
            return taken
