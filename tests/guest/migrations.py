"""Guests that move from one QEMU to another on this machine. Touches: both, through their monitors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .machines import Guest
from .processes import POLL_S, ChildError, Deadline, readable
from .streams import Json

MIB: Final = 1 << 20
MOVE_S: Final = 60.0
FAST: Final = 4096 * MIB
"""Bytes a second: as fast as this machine can."""
ENDS: Final = ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Moved:
    """How a migration went, as its source says."""

    total_ms: int
    downtime_ms: int
    passes: int  # over the guest's memory
    sent: int  # bytes


def begin(source: Guest, destination: Guest, path: Path, *, bytes_per_s: int = FAST) -> None:
    """Begin to send the guest to ``destination``, which was started to wait for one, over the Unix socket ``path``."""
    path.unlink(missing_ok=True)
    for side in (source, destination):
        side.qmp.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    destination.qmp.command("migrate-incoming", uri=f"unix:{path}")
    source.qmp.command("migrate-set-parameters", **{"max-bandwidth": bytes_per_s})
    source.qmp.command("migrate", uri=f"unix:{path}")


def end_of(side: Guest) -> str:
    """How the migration ended, as this side says when it does: one of `ENDS`."""
    while True:
        event = side.qmp.wait("MIGRATION", MOVE_S)["data"]
        assert isinstance(event, dict)
        if event["status"] in ENDS:
            return str(event["status"])


def completed(source: Guest) -> Moved:
    """Wait until ``source`` has sent everything. Raises `ChildError` when it does not come to that."""
    if (end := end_of(source)) != "completed":
        raise ChildError(f"the migration {end}: {question(source)}; {source.process.tail()}")
    said = question(source)
    ram = said["ram"]
    assert isinstance(ram, dict)
    return Moved(
        int(str(said["total-time"])), int(str(said["downtime"])), int(ram["dirty-sync-count"]), int(ram["transferred"])
    )


def question(side: Guest) -> Json:
    """What ``query-migrate`` says."""
    said = side.qmp.command("query-migrate")
    assert isinstance(said, dict)
    return said


def wait_sent(source: Guest, least: int) -> None:
    """Wait until ``least`` bytes of memory are on their way: nothing announces that, so QEMU is asked."""
    deadline = Deadline(MOVE_S)
    while True:
        ram = question(source).get("ram")
        if isinstance(ram, dict) and ram["transferred"] >= least:
            return
        if readable([source.process], POLL_S) or not deadline.left_s:
            raise ChildError(f"{least} bytes are not sent: {question(source)}; {source.process.tail()}")
