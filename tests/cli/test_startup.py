"""What a server imports: only what serving takes, and all of it before it gives files up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostuser import ControlClient

from .conftest import Serving
from .guest import OK, Guest

NOTED = "import time:"
"""How lines begin that the interpreter writes for each module it imports, to the file of the log."""

NEEDLESS = (
    "asyncio", "concurrent", "email", "http", "importlib.metadata", "logging.config", "msgspec", "pathlib", "rich",
    "shutil", "ssl", "subprocess", "tempfile", "unittest", "urllib", "xml",
    "vhostuser.bench", "vhostuser.copying", "vhostuser.frontend", "vhostuser.succession",
    "vhostuser.disks.faulty", "vhostuser.virtio.blk_requests",
)  # fmt: skip
"""Modules and packages that are for the standard library's other users, for drivers, testers and other commands."""

OF_BLK = {"device", "fitting", "information", "policy", "shape"}
"""The modules of `vhostuser.blk` for the device's side; all others are for the driver's."""

OF_CLI = {"failures", "logs", "main", "serve", "service", "signals"}


@pytest.fixture
def log(serving: Callable[..., Serving], tmp_path: Path) -> str:
    """What a server wrote that was used, asked by an operator and stopped: its log, and each module it imported."""
    image, place = tmp_path / "disk.img", tmp_path / "disk.sock"
    image.touch()
    os.truncate(image, 1 << 20)
    served = serving("serve", str(image), "--socket", str(place), variables={"PYTHONPROFILEIMPORTTIME": "1"})
    with Guest(place) as guest:
        guest.write(3, 7)
        assert guest.answered(1)
        assert guest.status(3) == OK
        assert guest.read(3) == bytes([7]) * 512
    with ControlClient(f"{place}.ctl") as client:
        client.call("disk.stats")
    assert served.stop() == 0
    return served.log


def imported(log: str) -> list[str]:
    """The names of the modules, in the order in which their imports ended."""
    return [line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith(NOTED)]


def below(package: str, names: list[str]) -> set[str]:
    """Those that are right in ``package``, without its name."""
    return {name.removeprefix(f"{package}.").partition(".")[0] for name in names if name.startswith(f"{package}.")}


def test_serving_imports_nothing_that_serving_does_not_need(log: str) -> None:
    names = imported(log)
    assert [name for name in names for other in NEEDLESS if name == other or name.startswith(f"{other}.")] == []
    assert below("vhostuser.blk", names) == OF_BLK
    assert below("vhostuser.cli", names) <= OF_CLI


def test_everything_is_imported_before_files_are_given_up(log: str) -> None:
    before, told, after = log.partition("vhostuser.sandbox: ")
    assert told
    assert imported(before)
    assert imported(after) == []
