"""An image that one server hands over to another: who has it, who waits, and who is kept out, whatever happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhostuser.disks import Disk, FileDisk, Holding, Takeover
from vhostuser.disks.faulty import Faults, FaultyDisk
from vhostuser.disks.locks import NOT_SHARED, taken
from vhostuser.errors import OperatorError, UsageError

QEMU_IMG = shutil.which("qemu-img")
SIZE = 1 << 20
HELD, WAITING, LENT = Holding.HELD, Holding.WAITING, Holding.LENT


class Pair:
    """A server that has the image and one that waits for it, as far as storage goes."""

    def __init__(self, image: Path, stack: ExitStack) -> None:
        self.image = image
        self._stack = stack
        self.source = self.open()
        self.source.activate()
        self.destination = self.open(incoming=True)

    def open(self, *, incoming: bool = False, read_only: bool = False, lock_timeout_s: float = 0.05) -> FileDisk:
        made = FileDisk(self.image, incoming=incoming, read_only=read_only, lock_timeout_s=lock_timeout_s)
        return self._stack.enter_context(made)

    @property
    def state(self) -> tuple[Holding, Holding]:
        return self.source.holding, self.destination.holding


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def pair(image: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(image, stack)


def test_the_image_goes_to_who_waits_when_it_is_used_no_longer(pair: Pair) -> None:
    assert pair.state == (HELD, WAITING)
    pair.source.deactivate()
    assert pair.state == (LENT, WAITING)
    assert pair.destination.activate() == Takeover(cache_off=False)
    assert pair.state == (LENT, HELD)
    assert pair.destination.activate() is None, "it is ours already"


def test_nobody_gets_an_image_that_is_in_use(pair: Pair) -> None:
    with pytest.raises(OperatorError, match="it is not handed over: another program") as refused:
        pair.destination.activate()
    assert "The other server lets go of it once all its rings have stopped" in str(refused.value)
    assert pair.state == (HELD, WAITING)
    pair.source.deactivate()
    pair.destination.activate()


def test_an_image_that_nobody_waits_for_is_kept(image: Path) -> None:
    with FileDisk(image) as disk:
        disk.activate()
        disk.deactivate()
        assert disk.holding is HELD
        with pytest.raises(OperatorError, match="another program"):
            FileDisk(image, lock_timeout_s=0)
        assert disk.activate() is None


def test_who_begins_to_wait_later_gets_it_when_it_is_looked_for_heirs(image: Path) -> None:
    with FileDisk(image) as source:
        source.activate()
        source.deactivate()
        with FileDisk(image, incoming=True, lock_timeout_s=10) as destination:
            taker = threading.Thread(target=destination.activate)
            taker.start()
            source.look_for_heir()
            taker.join()
            assert (source.holding, destination.holding) == (LENT, HELD)


def test_looking_for_heirs_takes_nothing_from_who_uses_it(pair: Pair) -> None:
    pair.source.look_for_heir()
    assert pair.state == (HELD, WAITING)


def test_a_migration_that_fails_before_the_destination_starts_goes_on_at_the_source(pair: Pair) -> None:
    pair.source.deactivate()
    assert pair.source.activate() == Takeover(cache_off=False)
    assert pair.state == (HELD, WAITING)
    with pytest.raises(OperatorError):
        pair.destination.activate()
    pair.source.deactivate()
    pair.destination.activate()
    assert pair.state == (LENT, HELD)


def test_the_source_is_refused_while_the_destination_has_it(pair: Pair) -> None:
    pair.source.deactivate()
    pair.destination.activate()
    with pytest.raises(OperatorError, match="it was handed over to another server: another program") as refused:
        pair.source.activate()
    assert "Go on where it was handed over to" in str(refused.value)
    pair.destination.close()
    assert pair.source.activate() is not None


def test_a_destination_that_could_not_begin_waits_again_and_the_source_goes_on(pair: Pair) -> None:
    pair.source.deactivate()
    pair.destination.activate()
    pair.destination.deactivate(unused=True)
    assert pair.state == (LENT, WAITING)
    pair.source.activate()
    pair.source.deactivate()
    pair.destination.activate()
    assert pair.state == (LENT, HELD)


def test_a_source_that_could_not_begin_again_leaves_the_image_to_the_destination(pair: Pair) -> None:
    pair.source.note_write_cache(on=False)
    pair.source.deactivate()
    pair.source.activate()
    pair.source.deactivate(unused=True)
    assert pair.destination.activate() == Takeover(cache_off=True)


def test_it_can_be_handed_on_and_on(pair: Pair) -> None:
    before = pair.destination
    pair.source.deactivate()
    before.activate()
    for _ in range(5):
        following = pair.open(incoming=True)
        before.deactivate()
        following.activate()
        assert (before.holding, following.holding) == (LENT, HELD)
        before.close()
        before = following


def test_one_waits_and_no_second_one(pair: Pair) -> None:
    with pytest.raises(OperatorError, match="another server waits for it already"):
        pair.open(incoming=True)
    pair.destination.close()
    assert pair.open(incoming=True).holding is WAITING


def test_one_who_waits_for_an_image_that_nobody_has_gets_it(image: Path) -> None:
    with FileDisk(image, incoming=True) as disk:
        assert disk.holding is WAITING
        assert disk.activate() == Takeover(cache_off=False)


def test_a_program_that_hands_nothing_over_is_not_waited_for(image: Path) -> None:
    with FileDisk(image, read_only=True), pytest.raises(OperatorError, match="and will not hand it over"):
        FileDisk(image, incoming=True, lock_timeout_s=0)


def test_a_program_that_only_has_it_open_is_no_server_to_wait_for(image: Path) -> None:
    with FileDisk(image) as copying:
        with pytest.raises(OperatorError, match="and will not hand it over"):
            FileDisk(image, incoming=True, lock_timeout_s=0)
        copying.look_for_heir()  # as a server does
        FileDisk(image, incoming=True, lock_timeout_s=0).close()


def test_a_third_server_is_refused_before_in_between_and_after(pair: Pair) -> None:
    for step in (lambda: None, pair.source.deactivate, pair.destination.activate):
        step()
        with pytest.raises(OperatorError, match="another program"):
            pair.open()
    with pytest.raises(OperatorError, match="another program"):
        pair.open(read_only=True)


@pytest.mark.skipif(QEMU_IMG is None, reason="qemu-img is not installed")
def test_qemu_img_does_not_write_it_at_any_time_of_a_hand_over(pair: Pair) -> None:
    command = [str(QEMU_IMG), "resize", "-f", "raw", str(pair.image), "2M"]
    for step in (lambda: None, pair.source.deactivate, pair.destination.activate):
        step()
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert found.returncode != 0
        assert "lock" in found.stderr
    assert pair.image.stat().st_size == SIZE


def test_a_source_that_was_killed_and_started_again_goes_on_while_somebody_waits(pair: Pair) -> None:
    """It is no other than any server that is started for this image: what counts is that nobody has it."""
    pair.source.close()
    again = pair.open()
    assert again.activate() is None
    with pytest.raises(OperatorError):
        pair.destination.activate()
    again.deactivate()
    pair.destination.activate()


def test_a_destination_gets_the_image_of_a_source_that_was_killed(pair: Pair) -> None:
    request = pair.source._fd.duplicate()  # stands for a request inside the kernel, which holds the open file
    pair.source.close()
    with pytest.raises(OperatorError):
        pair.destination.activate()
    request.close()
    assert pair.destination.activate() == Takeover(cache_off=False)


def test_a_destination_that_is_gone_leaves_nothing_behind(pair: Pair) -> None:
    pair.source.deactivate()
    pair.destination.close()
    pair.source.activate()
    pair.source.deactivate()
    assert pair.source.holding is HELD


def test_a_write_cache_that_is_off_crosses_with_the_image(pair: Pair) -> None:
    pair.source.note_write_cache(on=False)
    pair.source.deactivate()
    assert pair.destination.activate() == Takeover(cache_off=True)
    pair.destination.note_write_cache(on=False)
    pair.source.look_for_heir()  # the source forgets what is the destination's by now
    third = pair.open(incoming=True)
    pair.destination.note_write_cache(on=True)
    pair.destination.deactivate()
    assert third.activate() == Takeover(cache_off=False)


def test_the_source_shows_a_cache_that_is_off_until_the_destination_has_seen_it(pair: Pair) -> None:
    pair.source.note_write_cache(on=False)
    pair.source.deactivate()
    pair.source.look_for_heir()
    assert pair.destination.activate() == Takeover(cache_off=True)


class Failing(FileDisk):
    """What is written to it cannot be stored."""

    def flush(self) -> None:
        raise OSError(5, os.strerror(5))


def test_what_cannot_be_stored_is_not_handed_over(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Failing(image) as source, ExitStack() as stack:
        source.activate()
        destination = stack.enter_context(FileDisk(image, incoming=True, lock_timeout_s=0))
        for leave in (source.deactivate, source.look_for_heir, source.look_for_heir):
            leave()
        assert source.holding is HELD
        with pytest.raises(OperatorError):
            destination.activate()
        assert source.activate() is None
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert lines == [f"{image}: not handed over: what was written cannot be stored (Input/output error)"]


def test_an_image_that_is_another_server_s_keeps_its_size(pair: Pair) -> None:
    with pytest.raises(UsageError, match="another server has it"):
        pair.destination.resize(2 * SIZE)
    pair.source.deactivate()
    with pytest.raises(UsageError, match="another server has it"):
        pair.source.resize(2 * SIZE)
    pair.destination.activate()
    pair.destination.resize(2 * SIZE)
    assert pair.image.stat().st_size == 2 * SIZE


def test_readers_share_it_and_wait_for_nothing(image: Path) -> None:
    with FileDisk(image, read_only=True), FileDisk(image, read_only=True, incoming=True) as destination:
        assert destination.holding is HELD
        assert destination.activate() is None


def test_faults_are_handed_over_with_the_disk_below(image: Path) -> None:
    had = FileDisk(image)
    had.activate()
    waiting = FileDisk(image, incoming=True)
    with FaultyDisk(had, Faults()) as source, FaultyDisk(waiting, Faults()) as destination:
        source.activate()
        source.note_write_cache(on=False)
        disks: tuple[Disk, Disk] = (source, destination)
        assert [disk.holding for disk in disks] == [HELD, WAITING]
        source.deactivate()
        destination.look_for_heir()
        assert destination.activate() == Takeover(cache_off=True)
        assert [disk.holding for disk in disks] == [LENT, HELD]


def test_an_heir_that_is_refused_keeps_others_out_still(pair: Pair) -> None:
    with pytest.raises(OperatorError):
        pair.destination.activate()
    pair.source.deactivate()
    with open(pair.image, "rb") as file:
        claimed = [permission for permission in range(4) if taken(file.fileno(), NOT_SHARED + permission)]
    assert claimed == [1, 3], "the permissions to write and to resize, of everybody else"
