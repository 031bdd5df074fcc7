"""`vhostuser serve --incoming`: two real processes, one image, one of them at a time; in the sandbox, as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostuser import ControlClient

from .conftest import WAIT_S, Run, Serving
from .guest import OK, Guest, sector_of
from .test_failures import assert_one_line

Start = Callable[..., Serving]

MIB = 1 << 20
BUSY = "delay-write=2ms"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of 8 MiB."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 8 * MIB)
    return path


def info(place: Path) -> dict[str, object]:
    with ControlClient(f"{place}.ctl") as client:
        found = client.call("disk.info")
    assert isinstance(found, dict)
    return found


def images(*places: Path) -> list[object]:
    """Whose the image is, asked of each server."""
    return [info(place)["image"] for place in places]


def test_an_image_crosses_between_processes_while_requests_are_under_way(
    serving: Start, image: Path, tmp_path: Path
) -> None:
    places = [tmp_path / f"{number}.sock" for number in range(3)]
    here = serving("serve", str(image), "--socket", str(places[0]), "--inject", BUSY)
    with Guest(places[0]) as guest:
        for number, place in enumerate(places[1:]):
            there = serving("serve", str(image), "--socket", str(place), "--incoming", "--inject", BUSY)
            assert images(guest.place, place) == ["held", "waiting"]
            left_at = guest.place
            sectors = range(7 * number, 7 * number + 7)
            heads = [guest.write(sector, sector + 1) for sector in sectors]
            with guest.move(place):
                assert images(left_at, place) == ["lent", "held"]
                assert sorted(guest.answered(7)) == sorted(heads)
            assert [guest.status(sector) for sector in sectors] == [OK] * 7
            assert [guest.read(sector)[0] for sector in range(sectors.stop)] == list(range(1, sectors.stop + 1))
            assert "handed over to the server that waits for it" in here.log
            assert "sandbox: no file opened" in there.log
            assert here.stop() == 0
            here = there
    assert [sector_of(image, sector)[511] for sector in range(14)] == list(range(1, 15))


def test_a_failed_migration_goes_on_at_the_source_and_the_next_one_succeeds(
    serving: Start, run: Run, image: Path, tmp_path: Path
) -> None:
    source, destination = tmp_path / "a.sock", tmp_path / "b.sock"
    serving("serve", str(image), "--socket", str(source))
    served = serving("serve", str(image), "--socket", str(destination), "--incoming")
    shown = run("vhostuser", "stats", str(destination)).stdout
    assert "(its image is waiting)" in " ".join(shown.split())
    assert json.loads(run("vhostuser", "stats", str(destination), "--json").stdout)["image"] == "waiting"
    with Guest(source) as guest:
        guest.write(0, 1)
        guest.answered(1)
        base = guest.ring.stop(guest.peer)
        assert images(source, destination) == ["lent", "waiting"]
        served.kill()
        guest.ring.start(guest.peer, base=base)
        assert guest.read(0) == bytes([1]) * 512
        assert images(source) == ["held"]
        serving("serve", str(image), "--socket", str(destination), "--incoming")
        with guest.move(destination):
            assert guest.read(0) == bytes([1]) * 512


def test_a_source_that_is_killed_meanwhile_goes_on_when_it_is_started_again(
    serving: Start, image: Path, tmp_path: Path
) -> None:
    source, destination = tmp_path / "a.sock", tmp_path / "b.sock"
    served = serving("serve", str(image), "--socket", str(source))
    serving("serve", str(image), "--socket", str(destination), "--incoming")
    with Guest(source) as guest:
        for number in range(2):
            guest.write(number, number + 1)
            served.kill()
            served = serving("serve", str(image), "--socket", str(source))
            guest.connect()
            guest.answered(1)
        with guest.move(destination):
            assert [guest.read(sector)[0] for sector in range(2)] == [1, 2]


def test_a_destination_begun_late_gets_what_the_source_no_longer_uses(
    serving: Start, image: Path, tmp_path: Path
) -> None:
    source, destination = tmp_path / "a.sock", tmp_path / "b.sock"
    serving("serve", str(image), "--socket", str(source))
    with Guest(source) as guest:
        guest.write(0, 1)
        guest.answered(1)
        guest.ring.stop(guest.peer)
        assert images(source) == ["held"], "nobody waits for it"
        serving("serve", str(image), "--socket", str(destination), "--incoming")
        with Guest(destination) as other:
            assert other.read(0) == bytes([1]) * 512
        assert images(source, destination) == ["lent", "held"]


def test_a_second_one_who_waits_and_a_third_party_are_refused_in_one_line(
    serving: Start, run: Run, image: Path, tmp_path: Path
) -> None:
    serving("serve", str(image), "--socket", str(tmp_path / "a.sock"))
    serving("serve", str(image), "--socket", str(tmp_path / "b.sock"), "--incoming")
    third = ["serve", str(image), "--socket", str(tmp_path / "c.sock"), "--lock-timeout", "0"]
    done = run("vhostuser", *third, "--incoming")
    assert_one_line(done, 1)
    assert "another server waits for it already" in done.stderr
    done = run("vhostuser", *third)
    assert_one_line(done, 1)
    assert "another program" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("memory:size=1M", "--incoming"), "its content is no other server's"),
        (("{image}", "--incoming", "--no-lock"), "--incoming: images are handed over by their locks"),
    ],
)
def test_what_cannot_be_handed_over_is_a_matter_of_usage(
    run: Run, image: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    words = [word.format(image=image) for word in arguments]
    done = run("vhostuser", "serve", *words, "--socket", str(tmp_path / "a.sock"))
    assert_one_line(done, 2)
    assert said in done.stderr


def test_a_read_only_image_has_nothing_to_hand_over(serving: Start, image: Path, tmp_path: Path) -> None:
    source, destination = tmp_path / "a.sock", tmp_path / "b.sock"
    serving("serve", str(image), "--socket", str(source), "--read-only")
    serving("serve", str(image), "--socket", str(destination), "--read-only", "--incoming")
    assert images(source, destination) == ["held", "held"]
    with Guest(source) as guest, guest.move(destination):
        assert guest.read(0) == bytes(512)


# -- upgrades ---------------------------------------------------------------------------------------------------------


def upgraded(serving: Start, before: Serving, *arguments: str) -> Serving:
    after = serving(*arguments, "--upgrade")
    assert before.process.wait(WAIT_S) == 0
    return after


def test_a_destination_may_be_upgraded_while_it_waits_and_after(serving: Start, image: Path, tmp_path: Path) -> None:
    source, destination = tmp_path / "a.sock", tmp_path / "b.sock"
    serving("serve", str(image), "--socket", str(source))
    arguments = ("serve", str(image), "--socket", str(destination), "--incoming")
    served = serving(*arguments)
    with Guest(source) as guest:
        served = upgraded(serving, served, *arguments)
        assert images(source, destination) == ["held", "waiting"]
        guest.write(0, 1)
        guest.answered(1)
        with guest.move(destination):
            upgraded(serving, served, *arguments)
            assert images(destination) == ["waiting"]
            assert guest.peer.closed_by_peer()
            guest.connect()
            assert images(source, destination) == ["lent", "held"]
            assert guest.read(0) == bytes([1]) * 512


def test_a_source_may_be_upgraded_while_somebody_waits_for_its_image(
    serving: Start, image: Path, tmp_path: Path
) -> None:
    source, destination = tmp_path / "a.sock", tmp_path / "b.sock"
    arguments = ("serve", str(image), "--socket", str(source))
    served = serving(*arguments)
    serving("serve", str(image), "--socket", str(destination), "--incoming")
    with Guest(source) as guest:
        guest.write(0, 1)
        upgraded(serving, served, *arguments)
        assert guest.peer.closed_by_peer()
        guest.connect()
        guest.answered(1)
        with guest.move(destination):
            assert guest.read(0) == bytes([1]) * 512


def test_a_source_whose_image_is_gone_is_upgraded_by_one_that_waits_for_it(
    serving: Start, run: Run, image: Path, tmp_path: Path
) -> None:
    source, destination = tmp_path / "a.sock", tmp_path / "b.sock"
    arguments = ("serve", str(image), "--socket", str(source))
    served = serving(*arguments)
    serving("serve", str(image), "--socket", str(destination), "--incoming")
    with Guest(source) as guest, guest.move(destination):
        done = run("vhostuser", *arguments, "--upgrade")
        assert_one_line(done, 2)
        assert "the image of the running server is lent" in done.stderr
        upgraded(serving, served, *arguments, "--incoming")
        assert images(source, destination) == ["waiting", "held"]
        with guest.move(source):
            assert images(source, destination) == ["held", "lent"]
