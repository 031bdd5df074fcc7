"""`vhostuser migrate`: a disk moves between two servers, and the command says what happened."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhostuser import BlockDevice, MemoryDisk, Server, listen

from .conftest import Run, Serving


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[str]]:
    """Two back-ends of one disk, and one that is too small."""
    disk = MemoryDisk(1 << 20)
    with ExitStack() as stack:
        names = []
        for name, what in (("a", disk), ("b", disk), ("small", MemoryDisk(1 << 19))):
            device = BlockDevice(what, num_queues=2)
            stack.callback(device.close)
            names.append(str(tmp_path / name))
            stack.enter_context(Server(device, listen(names[-1])))
        yield names


def test_a_disk_moves_and_a_table_or_json_says_what_it_took(run: Run, places: list[str]) -> None:
    done = run("vhostuser", "migrate", places[0], places[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert "every page that was written was logged" in done.stdout
    done = run("vhostuser", "migrate", *places[:2], "--there-and-back", "2", "--write", "--queues", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert [move["destination"] for move in told["moves"]] == [places[1], places[0]] * 2
    assert all(move["differing"] == [] for move in told["moves"])
    assert told["requests"] > 0


def test_a_destination_that_does_not_fit_is_one_line_and_exit_1(run: Run, places: list[str]) -> None:
    done = run("vhostuser", "migrate", places[0], places[2])
    assert done.returncode == 1
    assert done.stderr.startswith(f"vhostuser: {places[2]}: the disk was not moved: its size in sectors")
    assert done.stderr.count("\n") == 1


def test_a_disk_moves_between_two_processes_that_share_an_image(
    run: Run, serving: Callable[..., Serving], tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    places = [tmp_path / "a.sock", tmp_path / "b.sock"]
    serving("serve", str(image), "--socket", str(places[0]))
    serving("serve", str(image), "--socket", str(places[1]), "--incoming")
    done = run("vhostuser", "migrate", *map(str, places), "--write", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (move,) = json.loads(done.stdout)["moves"]
    assert move["differing"] == []
    assert move["state_bytes"] == 128
    assert any(image.read_bytes()), "the load has written"
