"""Back-ends killed with SIGKILL under guests, fifty times each: nothing is lost, repeated, torn or misplaced."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.conftest import ROOT
from tests.guest.backends import Export, Forgetful, Ours
from tests.guest.conftest import Boot, Serve
from tests.guest.images import MIB, blank
from tests.guest.kills import DELAYS_S, Tally, keep, kill_often
from tests.guest.loads import RandomLoad, trouble
from tests.guest.machines import RECONNECT_MS_SINCE, Disk, Guest
from tests.guest.prepare import Machine
from tests.guest.sweeps import Sweep

pytestmark = pytest.mark.guest

KILLS: Final = int(os.environ.get("VHOSTUSER_KILLS", "50"))  # fewer, for a quick look
LIMIT_S: Final = 900.0
SEEN: Final = ROOT / "build" / "guest-kills.json"
IDLE_DELAYS_S: Final = (0.01, 0.2)
SLOW: Final = "delay-read=6ms,delay-write=10ms,delay-flush=15ms"
"""Each request takes half to one and a half times as long: they end in another order than they began."""


@dataclass(frozen=True, slots=True)
class Victim:
    """One disk of the guest, and the back-end that is killed under it."""

    name: str
    backend: Ours
    disk: Disk


class Victims:
    """Makes disks whose back-ends are killed, and kills them from threads that live as long as the test."""

    def __init__(self, serve: Serve, place: Path, stack: ExitStack) -> None:
        self._serve = serve
        self._place = place
        self._stack = stack
        self._pool = stack.enter_context(ThreadPoolExecutor(max_workers=8))
        self._stop = threading.Event()
        self._killing: list[Future[Tally]] = []
        self.all: list[Victim] = []

    def add(self, engine: str, queues: int, size: int = 16 * MIB, **export: object) -> Victim:
        """A disk of its own engine and number of queues."""
        name = f"{engine}-{queues}"
        backend = self._serve(blank(self._place / f"{name}.img", size), engine=engine, queues=queues, **export)
        if not isinstance(backend, Ours):
            pytest.skip("only our back-end is killed here")
        number = len(self.all)
        disk = Disk(backend.socket, f"d{number}", {"num-queues": queues}, reconnect=True)
        self.all.append(Victim(name, backend, disk))
        return self.all[-1]

    def kill(self, guest: Guest, *delays_s: float) -> None:
        """Begin to kill all of them at the same time."""
        self._stack.callback(self._leave)
        started = guest.qemu.version < RECONNECT_MS_SINCE
        for number, victim in enumerate(self.all):
            self._killing.append(
                self._pool.submit(
                    kill_often,
                    victim.backend,
                    KILLS,
                    number,
                    self._stop,
                    started=started,
                    delays_s=delays_s or DELAYS_S,
                )
            )

    def _leave(self) -> None:
        self._stop.set()
        wait(self._killing)

    @property
    def dying(self) -> bool:
        """Whether any of them is still to be killed."""
        return not all(killing.done() for killing in self._killing)

    def tallies(self, test: str, guest: Guest) -> list[Tally]:
        """What the kills did, once they are over; kept for the documentation."""
        tallies = [killing.result(LIMIT_S) for killing in self._killing]
        rows = {victim.name: tally.summary() for victim, tally in zip(self.all, tallies, strict=True)}
        keep(SEEN, f"{test} / QEMU {guest.qemu.name}", rows)
        for victim, tally in zip(self.all, tallies, strict=True):
            assert tally.kills == KILLS, victim.name
        return tallies


@pytest.fixture
def victims(serve: Serve, place: Path, stack: ExitStack) -> Victims:
    """The threads that kill are entered first, so that they outlive the processes that they start."""
    return Victims(serve, place, stack)


def loads_of(victims: Victims, threads: int = 4) -> list[RandomLoad]:
    """One load for each disk."""
    return [
        RandomLoad(f"vd{chr(ord('a') + number)}", Path(victim.backend.image), threads)
        for number, victim in enumerate(victims.all)
    ]


def run_loads(victims: Victims, guest: Guest, machine: Machine, test: str, threads: int) -> list[Tally]:
    """Load every disk while its back-end dies fifty times, and look whether all is as it should be."""
    loads = loads_of(victims, threads)
    for load in loads:
        load.start(guest)
    victims.kill(guest)
    tallies = victims.tallies(test, guest)
    for load in loads:
        assert load.ended(guest)["writes"] > 0
        load.check(guest, machine)
    assert trouble(guest) == []
    assert all(tally.requests for tally in tallies)
    return tallies


def test_fifty_kills_under_load_lose_repeat_tear_and_misplace_nothing(
    victims: Victims, boot: Boot, machine: Machine
) -> None:
    for engine in ("io_uring", "syscalls"):
        for queues in (1, 4):
            victims.add(engine, queues)
    guest = boot(*(victim.disk for victim in victims.all), cpus=4, memory_mib=384)
    for victim in victims.all:
        acked = victim.backend.information()["features_acked"]
        assert {"INDIRECT_DESC", "EVENT_IDX"} <= set(acked)
    run_loads(victims, guest, machine, "under load", threads=6)


def test_fifty_kills_of_slow_storage_that_answers_out_of_order_change_nothing(
    victims: Victims, boot: Boot, machine: Machine
) -> None:
    victims.add("io_uring", 4, inject=SLOW)
    victims.add("syscalls", 1, inject=SLOW)
    guest = boot(*(victim.disk for victim in victims.all), cpus=4, memory_mib=384)
    tallies = run_loads(victims, guest, machine, "slow storage", threads=16)
    assert all(tally.most > 8 for tally in tallies)


def test_fifty_kills_of_idle_disks_are_not_noticed(victims: Victims, boot: Boot, machine: Machine) -> None:
    victims.add("io_uring", 4)
    victims.add("syscalls", 1)
    guest = boot(*(victim.disk for victim in victims.all), cpus=4)
    loads = loads_of(victims)
    for load in loads:
        load.start(guest)
    said = [load.ended(guest) for load in loads]
    assert all(words["writes"] for words in said)
    victims.kill(guest, *IDLE_DELAYS_S)
    assert not any(tally.requests for tally in victims.tallies("idle", guest))
    for load in loads:
        load.check(guest, machine)
    for load in loads:
        load.start(guest)
    assert all(load.ended(guest)["writes"] for load in loads)
    assert trouble(guest) == []


def test_fifty_kills_while_the_guest_reboots_lose_nothing_flushed(
    victims: Victims, boot: Boot, machine: Machine
) -> None:
    victims.add("io_uring", 4, size=6 * MIB)
    victims.add("syscalls", 1, size=6 * MIB)
    guest = boot(*(victim.disk for victim in victims.all), cpus=4)
    sweeps = [Sweep("/dev/vda"), Sweep("/dev/vdb")]
    victims.kill(guest)
    boots = 0
    while victims.dying or boots < 4:
        for sweep in sweeps:
            sweep.start(guest)
        for sweep in sweeps:
            sweep.wait_rounds(guest, 6)
        again = guest.reset if boots % 2 else guest.reboot
        again()
        boots += 1
        for sweep in sweeps:
            sweep.note(guest)
            sweep.check(guest)
    victims.tallies(f"while the guest boots {boots} times", guest)
    for sweep, victim in zip(sweeps, victims.all, strict=True):
        sweep.check_image(machine, Path(victim.backend.image))
    assert trouble(guest) == []


def test_without_tracking_kills_do_lose_requests_so_that_these_tests_can_fail(
    boot: Boot, place: Path, stack: ExitStack
) -> None:
    backend = stack.enter_context(Forgetful(blank(place / "f.img", 16 * MIB), place, Export(queues=1, inject=SLOW)))
    guest = boot(Disk(backend.socket, reconnect=True))
    load = RandomLoad("vda", Path(backend.image), threads=16)
    load.start(guest)
    kill_often(backend, 8, 1, threading.Event(), delays_s=(0.3,))
    said = guest.attempt(
        "for load in $(pidof load); do kill $load; done; tries=0; "
        "until [ -e /tmp/vda.said ] || [ $tries = 100 ]; do usleep 100000; tries=$((tries + 1)); done; "
        "cat /tmp/vda.said"
    ).output
    assert "load: ok" not in said or trouble(guest)
