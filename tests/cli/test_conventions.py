"""`vhost-user-blk` as management software calls it (vhost-user: Backend program conventions)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .conftest import Run

DISCOVERY = Path(__file__).parents[2] / "data" / "data" / "share" / "qemu" / "vhost-user" / "50-vhostuser-blk.json"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--print-capabilities",),
        ("--print-capabilities", "--fd=99", "--socket-path", "/nowhere/x.sock", "--blk-file=/nowhere/x.img"),
        ("--no-such-option", "stray", "--print-capabilities"),
        ("--fd", "--print-capabilities"),
    ],
)
def test_print_capabilities_ignores_everything_else(run: Run, arguments: tuple[str, ...]) -> None:
    done = run("vhost-user-blk", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}


def test_print_discovery_names_an_absolute_program(run: Run) -> None:
    found = json.loads(run("vhost-user-blk", "--print-discovery").stdout)
    assert found["type"] == "block"
    assert Path(found["binary"]).is_absolute()
    assert Path(found["binary"]).name == "vhost-user-blk"
    assert set(found) == {"description", "type", "binary", "tags"}


def test_the_installed_discovery_file_says_the_same(run: Run) -> None:
    assert re.fullmatch(r"\d\d-[a-z-]+\.json", DISCOVERY.name)
    printed = json.loads(run("vhost-user-blk", "--print-discovery").stdout)
    installed = json.loads(DISCOVERY.read_text())
    assert {**installed, "binary": ""} == {**printed, "binary": ""}
    assert Path(installed["binary"]).is_absolute()
