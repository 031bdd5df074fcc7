"""Guests that move from one QEMU to another while they write, their disks served by our back-end on both sides.

QEMU 7.2 is left out: under TCG it damages guests on the way that have no disk at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from tests.guest.backends import Export, Ours, Unlogged
from tests.guest.images import MIB, SECTOR, blank
from tests.guest.kills import in_flight_of, marked
from tests.guest.machines import Guest
from tests.guest.migrations import completed, end_of, wait_sent
from tests.guest.prepare import Machine, Qemu
from tests.guest.processes import POLL_S, Deadline, readable
from tests.guest.travels import Luggage, Place, Traveller

import vhostuser

pytestmark = pytest.mark.guest

MIGRATES_SINCE: Final = (10, 0)
CARRIES_SINCE: Final = (11, 0)
SIZE: Final = 2 * MIB
HELD: Final = 4
DISKS: Final = ("vda", "vdb")
LIMIT_S: Final = 60.0
SLOWLY: Final = 2 * MIB
"""Bytes a second at which a migration takes most of a minute, so that something can happen on the way."""
SLOW: Final = "delay-read=30ms,delay-write=10ms,delay-flush=15ms"
"""Each request takes half to one and a half times as long, so that many are under way when the guest stops."""
LATE: Final = {"engine": "io_uring", "queues": 1, "inject": "delay-read=200ms"}
KINDS: Final = (
    {"engine": "io_uring", "queues": 1},
    {"engine": "syscalls", "queues": 4},
    {"engine": "io_uring", "queues": 4, "inject": SLOW},
    {"engine": "syscalls", "queues": 1, "inject": SLOW},
)

Travel = Callable[..., Traveller]


@pytest.fixture
def travel(qemu: Qemu, machine: Machine, place: Path, stack: ExitStack) -> Travel:
    """Boot a guest that can move: ``travel([fields of Export of each disk, ...], field of Luggage=value, ...)``.

    Where QEMU can carry requests in flight, it does for every second disk, unless ``options`` say otherwise.
    """
    if qemu.version < MIGRATES_SINCE:
        pytest.skip("this QEMU damages guests that migrate under TCG, with or without disks")

    def start(kinds: Sequence[Mapping[str, object]] = KINDS[:1], *, threads: int = 2, **more: object) -> Traveller:
        carried = {"options": {"inflight-migration": True}} if qemu.version >= CARRIES_SINCE else {}
        pieces = [
            Luggage(
                blank(place / f"disk{number}.img", SIZE),
                Export(**kind),  # type: ignore[arg-type]
                **((carried if number % 2 else {}) | more),  # type: ignore[arg-type]
            )
            for number, kind in enumerate(kinds)
        ]
        return stack.enter_context(Traveller(qemu, machine, place, pieces, threads))

    return start


def test_ten_times_there_and_back_under_load_not_one_block_differs(travel: Travel) -> None:
    traveller = travel(KINDS)
    for backend in traveller.here.backends:
        acked = backend.information()["features_acked"]
        assert isinstance(acked, list)
        assert {"INDIRECT_DESC", "EVENT_IDX"} <= set(acked)
    for _ in range(20):
        there = traveller.destination()
        traveller.load()
        traveller.go(there)
        traveller.verify()
    traveller.check()


def test_without_the_dirty_log_guests_are_damaged_so_that_these_tests_can_fail(travel: Travel) -> None:
    traveller = travel([LATE, LATE], kind=Unlogged)
    for _ in range(4):
        there = traveller.destination()
        traveller.load()
        traveller.go(there)
        if traveller.damaged():
            return
    pytest.fail("eight migrations without a dirty log changed nothing")


@pytest.fixture
def traveller(travel: Travel) -> Traveller:
    """A guest with two disks, one of which is slow."""
    return travel(KINDS[1:3])


def half_way(traveller: Traveller, there: Place) -> None:
    """Load the guest, and have it on its way with a part of its memory at the other end."""
    traveller.load()
    traveller.set_out(there, bytes_per_s=SLOWLY)
    wait_sent(traveller.guest, 2 * MIB)


def prove(traveller: Traveller) -> None:
    """The loads that run have met nothing wrong, and the next migration is like any other."""
    traveller.wait_writes()
    traveller.verify()
    traveller.load()
    traveller.go(traveller.destination())
    traveller.verify()
    traveller.check()


def assert_it_goes_on_at_the_source(traveller: Traveller, there: Place) -> None:
    """The source believes that the guest has left, and can have it back."""
    assert end_of(traveller.guest) == "completed"
    assert status(traveller.guest) == "postmigrate"
    there.leave()
    traveller.guest.qmp.command("cont")
    prove(traveller)


def status(guest: Guest) -> object:
    """What QEMU says about its guest in one word."""
    said = guest.qmp.command("query-status")
    assert isinstance(said, dict)
    return said["status"]


def test_a_migration_cancelled_half_way_is_not_noticed_and_the_next_one_arrives(traveller: Traveller) -> None:
    there = traveller.destination()
    half_way(traveller, there)
    traveller.guest.qmp.command("migrate_cancel")
    assert end_of(traveller.guest) == "cancelled"
    there.leave()
    prove(traveller)


def test_a_destination_with_other_features_refuses_and_the_source_goes_on(traveller: Traveller) -> None:
    there = traveller.destination([replace(piece, options={"discard": False}) for piece in traveller.luggage])
    traveller.load()
    traveller.set_out(there)
    assert there.guest.process.wait(LIMIT_S) == 1
    assert "unsupported. Allowed features" in there.guest.process.tail()
    assert_it_goes_on_at_the_source(traveller, there)


def test_where_another_server_keeps_the_image_no_ring_starts_and_the_source_goes_on(
    traveller: Traveller, place: Path, stack: ExitStack
) -> None:
    other = blank(place / "other.img", SIZE)
    third = stack.enter_context(Ours(other, place, Export()))
    stack.enter_context(vhostuser.connect(str(third.socket)))
    first, *rest = traveller.luggage
    there = traveller.destination([replace(first, image=other, export=replace(first.export, lock_timeout=0.5)), *rest])
    traveller.load()
    traveller.set_out(there)
    there.guest.qmp.wait("RESUME", LIMIT_S)
    there.backends[0].process.wait_output("it is not handed over: another program", LIMIT_S)
    assert_it_goes_on_at_the_source(traveller, there)
    assert not any(other.read_bytes())


def test_a_disk_that_grows_during_a_migration_has_grown_for_the_guest_at_either_end(traveller: Traveller) -> None:
    there = traveller.destination()
    half_way(traveller, there)
    for number, backend in enumerate(traveller.here.backends):
        backend.resize(2 * SIZE)
        traveller.guest.run(
            f"until [ $(cat /sys/block/{DISKS[number]}/size) = {2 * SIZE // SECTOR} ]; do usleep 20000; done"
        )
    traveller.arrive(there)
    for number, backend in enumerate(there.backends):
        assert backend.information()["size"] == 2 * SIZE
        assert traveller.guest.run(f"cat /sys/block/{DISKS[number]}/size") == f"{2 * SIZE // SECTOR}\n"
        traveller.guest.run(
            f"load --direct --threads=2 --seconds=0.2 --offset={SIZE} --largest=64K /dev/{DISKS[number]}", LIMIT_S
        )
    assert "attempt to access beyond end of device" not in traveller.guest.run("dmesg")
    prove(traveller)


def test_a_write_cache_switched_off_during_a_migration_is_off_at_the_destination(
    traveller: Traveller, qemu: Qemu
) -> None:
    there = traveller.destination()
    half_way(traveller, there)
    for name in DISKS[:2]:
        traveller.guest.run(f"echo 'write through' >/sys/block/{name}/cache_type")
    traveller.arrive(there)
    for name, backend in zip(DISKS, there.backends, strict=False):
        assert backend.information()["writeback"] is False
        if qemu.version < CARRIES_SINCE:  # QEMU 11.1 shows the guest what it read before the guest came
            traveller.guest.run(f"until grep -q through /sys/block/{name}/cache_type; do usleep 20000; done", LIMIT_S)
            traveller.guest.run(f"echo 'write back' >/sys/block/{name}/cache_type")
            assert backend.information()["writeback"] is True
    prove(traveller)


def test_a_back_end_of_the_source_killed_during_a_migration_is_not_noticed(travel: Travel) -> None:
    traveller = travel(KINDS[1:3], reconnect=True)
    there = traveller.destination()
    half_way(traveller, there)
    for backend in traveller.here.backends:
        backend.kill()
        backend.restart()
    traveller.arrive(there)
    prove(traveller)


def test_a_back_end_of_the_destination_killed_while_it_waits_is_not_noticed(travel: Travel) -> None:
    traveller = travel(KINDS[1:3], reconnect=True)
    there = traveller.destination()
    half_way(traveller, there)
    for backend in there.backends:
        backend.kill()
        backend.restart()
    traveller.arrive(there)
    prove(traveller)


def test_back_ends_of_the_destination_that_are_away_when_the_guest_arrives_may_come_later(travel: Travel) -> None:
    traveller = travel(KINDS[1:3], reconnect=True)
    there = traveller.destination()
    half_way(traveller, there)
    for backend in there.backends:
        backend.kill()
    traveller.hurry()
    there.guest.qmp.wait("RESUME", LIMIT_S)
    for backend in there.backends:
        backend.restart()
    traveller.settle(there)
    prove(traveller)


def test_requests_that_are_kept_when_the_guest_stops_are_done_at_the_destination(travel: Travel, qemu: Qemu) -> None:
    if qemu.version < CARRIES_SINCE:
        pytest.skip("this QEMU sends no region of requests in flight")
    failing = {"engine": "io_uring", "queues": 4, "inject": "error-write=5%", "on_error": "hold"}
    traveller = travel([failing], threads=16, options={"inflight-migration": True})
    (piece,) = traveller.luggage
    there = traveller.destination([replace(piece, export=replace(piece.export, inject=None))])
    traveller.load()
    wait_held(traveller.here.backends[0], HELD)
    with in_flight_of(traveller.here.backends[0]) as regions:
        traveller.set_out(there)
        completed(traveller.guest)
        assert sum(map(marked, regions)) >= HELD
    traveller.arrived(there)
    traveller.wait_writes()
    traveller.verify()
    traveller.check()


def wait_held(backend: Ours, least: int) -> None:
    """Wait until the back-end keeps so many requests that storage has failed."""
    deadline = Deadline(LIMIT_S)
    while sum(one["state"] == "held" for one in backend.in_flight()) < least:
        assert deadline.left_s, backend.in_flight()
        readable([backend.process], POLL_S)
