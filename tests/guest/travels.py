"""A guest that travels from QEMU to QEMU with its disks, each of which has a back-end of its own at either end.

Touches: processes, images, the load on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .backends import Export, Ours
from .loads import RandomLoad, trouble
from .machines import Disk, Guest, Setup
from .migrations import FAST, MOVE_S, Moved, begin, completed, end_of
from .prepare import Machine, Qemu

MEMORY_MIB: Final = 128


@dataclass(frozen=True, slots=True)
class Luggage:
    """One disk of the guest: its image, how it is served at either end, the options of QEMU's device."""

    image: Path
    export: Export
    options: dict[str, str | int | bool] = field(default_factory=dict)
    reconnect: bool = False
    kind: type[Ours] = Ours

    def disk(self, number: int, backend: Ours) -> Disk:
        """The device of the guest's ``number``th disk."""
        options = {"num-queues": self.export.queues or 1, **self.options}
        return Disk(backend.socket, f"d{number}", options, reconnect=self.reconnect)


@dataclass(frozen=True, slots=True)
class Place:
    """One end of a migration: a QEMU and the back-ends of its disks."""

    guest: Guest
    backends: Sequence[Ours]

    def leave(self) -> None:
        """End what no guest is in any more; raises `ChildError` when a back-end does not end well."""
        self.guest.process.close()
        self.guest.qmp.close()
        self.guest.shell.close()
        for backend in self.backends:
            if backend.process.alive:
                backend.stop()
            backend.close()


class Traveller:
    """The guest, wherever it is; ends with the block, and all that it left behind."""

    def __init__(self, qemu: Qemu, machine: Machine, directory: Path, luggage: Sequence[Luggage], threads: int) -> None:
        """Boot the guest, with a processor for each queue of a disk, and wait until it takes commands.

        ``threads``: how many of each disk's load.
        """
        self.machine = machine
        size = min(piece.image.stat().st_size for piece in luggage)
        self.luggage = tuple(luggage)
        self.loads = [
            RandomLoad(f"vd{chr(ord('a') + number)}", piece.image, threads, f"--largest=256K --size={size}", known=True)
            for number, piece in enumerate(luggage)
        ]
        self._qemu = qemu
        self._directory = directory
        self._setup = Setup(memory_mib=MEMORY_MIB, cpus=max(piece.export.queues or 1 for piece in luggage))
        self._stack = ExitStack()
        with ExitStack() as stack:
            # The threads that start back-ends live as long as they: a child dies with the thread that made it.
            self._pool = stack.enter_context(ThreadPoolExecutor(max_workers=len(luggage)))
            self._stack = stack
            self.here = self._place(self.luggage, incoming=False)
            self.guest.wait_ready()
            self._stack = stack.pop_all()

    @property
    def guest(self) -> Guest:
        """The guest where it runs now."""
        return self.here.guest

    def destination(self, luggage: Sequence[Luggage] | None = None) -> Place:
        """Somewhere to go: back-ends and a QEMU that wait. ``luggage``: disks that are not made as here."""
        waiting = [replace(piece, export=replace(piece.export, incoming=True)) for piece in luggage or self.luggage]
        return self._place(waiting, incoming=True)

    def set_out(self, there: Place, *, bytes_per_s: int = FAST) -> None:
        """Begin to move to ``there``."""
        begin(self.guest, there.guest, self._directory / "road", bytes_per_s=bytes_per_s)

    def hurry(self) -> None:
        """Have a guest under way sent as fast as can be."""
        self.guest.qmp.command("migrate-set-parameters", **{"max-bandwidth": FAST})

    def arrive(self, there: Place) -> Moved:
        """Wait until the guest runs ``there``, and end what it left behind. Raises `ChildError` if it gets nowhere."""
        self.hurry()
        moved = completed(self.guest)
        self.arrived(there)
        return moved

    def arrived(self, there: Place) -> None:
        """Wait until the guest runs ``there``, and end what it left behind."""
        there.guest.qmp.wait("RESUME", MOVE_S)
        self.settle(there)

    def settle(self, there: Place) -> None:
        """The guest has begun to run ``there``: talk to it there, and end what it left behind."""
        assert end_of(there.guest) == "completed"
        there.guest.continues(self.guest)
        left, self.here = self.here, there
        left.leave()

    def go(self, there: Place) -> Moved:
        """Move to ``there``, and end what is left behind."""
        self.set_out(there)
        return self.arrive(there)

    def load(self) -> None:
        """Have every disk loaded, and wait until each has been written to."""
        for load in self.loads:
            load.start(self.guest)
        self.wait_writes()

    def wait_writes(self) -> None:
        """Wait until the guest has written some more to each disk."""
        for load in self.loads:
            load.wait_writes(self.guest)

    def verify(self) -> None:
        """End the loads: each found every block of its disk as it knew it, and the kernel complained about nothing."""
        for load in self.loads:
            said = load.ended(self.guest)
            assert said["writes"] > 0
            assert said["unknown"] == 0
        assert trouble(self.guest) == []

    def damaged(self, limit_s: float = 10.0) -> bool:
        """Whether the guest or a load has met anything that a good disk does not do; the loads are ended if not."""
        try:
            said = self.guest.attempt(
                "for load in $(pidof load); do kill $load; done; tries=0; "
                f"until [ $(ls /tmp/*.said | wc -l) = {len(self.loads)} ] || [ $tries = 50 ]; do "
                "usleep 100000; tries=$((tries + 1)); done; cat /tmp/*.said",
                limit_s,
            ).output
        except (AssertionError, TimeoutError):
            return True
        return said.count("load: ok") < len(self.loads) or bool(trouble(self.guest))

    def check(self) -> None:
        """Read every disk again, in the guest and around it on the host."""
        for load in self.loads:
            load.check(self.guest, self.machine)

    def _place(self, luggage: Sequence[Luggage], *, incoming: bool) -> Place:
        started = list(self._pool.map(lambda piece: piece.kind(piece.image, self._directory, piece.export), luggage))
        backends = [self._stack.enter_context(backend) for backend in started]
        disks = [
            piece.disk(number, backend) for number, (piece, backend) in enumerate(zip(luggage, backends, strict=True))
        ]
        guest = Guest(self._qemu, self.machine, self._directory, disks, self._setup, incoming=incoming)
        return Place(self._stack.enter_context(guest), backends)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
