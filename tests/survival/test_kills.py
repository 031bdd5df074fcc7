"""Whole processes of `vhostuser serve`, killed at any moment and at every step, under a load that verifies itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
from tests.survival.__main__ import BLOCKS, LIMIT_S, connect_in_time, kill_at_random
from tests.survival.load import Load
from tests.survival.model import BLOCK, Violation
from tests.survival.supervisor import ROOT, STEPPING, Supervisor, ours, search_path, stepping_package

import vhostuser
from vhostuser.virtio.features import RingFeature

STEPS: Final = [
    "taken", "marked", "begun", "submitted", "reaped", "status", "linked", "pushed", "used_idx", "cleared",
    "region_idx", "fenced", "notified",
]  # fmt: skip
"""The points on the way of a request, in order; `native/kill/src/states.rs` has them too."""
RECOVERY: Final = {
    "recover_cleared": "used_idx",
    "recover_used_idx": "used_idx",
    "recovered": "begun",
    "replayed": "begun",
}
"""Steps of a successor, with the step at which its predecessor dies."""
STATES: Final[Mapping[str, tuple[dict[str, int], tuple[str, ...]]]] = {
    "event_idx": ({}, ()),
    "no event_idx, no indirect": (
        {"features": ~int(RingFeature.EVENT_IDX | RingFeature.INDIRECT_DESC) & (1 << 64) - 1},
        (),
    ),
    "2 queues, small rings": ({"queues": 2, "queue_size": 16}, ("--queues", "2")),
    "syscalls, out of order": ({}, ("--engine", "syscalls", "--inject", "delay-read=3ms,delay-write=3ms")),
    "direct": ({}, ("--cache", "none")),
}


def fresh_image(place: Path) -> Path:
    image = place / "disk.img"
    image.write_bytes(bytes(BLOCK * BLOCKS))
    return image


@pytest.mark.parametrize(
    ("kills", "options"),
    [
        (4, ()),
        pytest.param(300, (), marks=pytest.mark.kills),
        pytest.param(100, ("--cache", "none", "--inject", "delay-write=2ms,delay-read=1ms"), marks=pytest.mark.kills),
        pytest.param(100, ("--engine", "syscalls", "--queues", "2"), marks=pytest.mark.kills),
    ],
)
def test_a_load_does_not_notice_that_its_back_end_is_killed_at_any_moment(
    kills: int, options: tuple[str, ...], place: Path
) -> None:
    image, path = fresh_image(place), place / "disk.sock"
    with Supervisor(ours(image, path, *options), place) as supervisor:
        report = kill_at_random(supervisor, path, image, kills, seed=kills, queues=2 if "--queues" in options else 1)
    print(report)
    assert report.kills == kills
    assert report.failed == 0
    assert report.answered > 10 * kills


def die_at(supervisor: Supervisor, load: Load, step: str, count: int) -> None:
    """Start a back-end that kills itself at a step, and keep it busy until it has."""
    child = supervisor.start({"VHOSTUSER_STEP": f"{step}:{count}"})
    for _ in range(100_000):
        if not child.alive:
            break
        load.fill()
        load.settle(0.05)  # it may have died with everything answered
    else:
        raise Violation(f"step {step} was never reached")
    supervisor.lost()


@pytest.fixture(scope="session")
def stepping() -> dict[str, str]:
    """The environment of a process whose native module has the steps."""
    if why := stepping_package():
        pytest.skip(f"the native module with steps: {why}")
    return {"PYTHONPATH": search_path(STEPPING, ROOT)}


@pytest.mark.kills
@pytest.mark.parametrize("state", STATES)
def test_a_load_does_not_notice_at_which_step_its_back_end_is_killed(
    state: str, stepping: dict[str, str], place: Path
) -> None:
    client_options, options = STATES[state]
    image, path = fresh_image(place), place / "disk.sock"
    with Supervisor(ours(image, path, *options), place, stepping) as supervisor:
        supervisor.start()
        with connect_in_time(path, **client_options) as disk:
            load = Load(disk, BLOCKS, 24, len(state))
            load.fill()
            supervisor.kill()
            for count, step in enumerate(STEPS, 1):
                die_at(supervisor, load, step, 1 + count % 4)
            for step, before in RECOVERY.items():
                die_at(supervisor, load, before, 2)
                die_at(supervisor, load, step, 1)
            supervisor.start()
            load.finish(LIMIT_S)
            load.read_all()
        supervisor.kill()
    load.model.check_image(image.read_bytes())


def test_the_native_module_as_it_is_built_for_users_has_no_step_at_which_it_could_be_killed() -> None:
    assert b"VHOSTUSER_STEP" not in Path(vhostuser._native.__file__).read_bytes()
