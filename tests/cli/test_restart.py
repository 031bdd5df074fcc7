"""The end of a served disk and its next beginning, as real processes: nothing is lost, repeated, or in the way."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vhostuser import ControlClient
from vhostuser.errors import VhostUserError
from vhostuser.jsonrpc import ControlError
from vhostuser.protocol import FrontendRequest, VringState
from vhostuser.transport import connect

from .conftest import WAIT_S, Run, Serving, command_line, environment
from .guest import OK, Guest, sector_of
from .test_failures import assert_one_line

Start = Callable[..., Serving]

MIB = 1 << 20
HANGS = "delay-write=3600s"
PROMPT_S = 8.0
"""Far below what a hanging disk would take, far above what a busy machine does."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of 8 MiB."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 8 * MIB)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where to serve."""
    return tmp_path / "disk.sock"


def taken(place: Path, count: int) -> None:
    """Wait until so many requests are in flight."""
    with ControlClient(f"{place}.ctl") as client:
        while True:
            found = client.call("disk.stats")
            assert isinstance(found, dict)
            if sum(queue["in_flight"] for queue in found["queues"]) == count:
                return


@contextmanager
def starting(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    """A program that may have to wait before it is ready, and the lines of its log as they come."""
    process = subprocess.Popen(
        command_line("vhostuser", *arguments), env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        yield process, iter(process.stderr.readline, "")
    finally:
        process.kill()
        process.communicate()


def line_with(lines: Iterator[str], words: str) -> str:
    """The next line of a log that has these words in it."""
    seen = []
    for line in lines:
        seen.append(line)
        if words in line:
            return line
    raise AssertionError(f"{words!r} was not said: {seen}")


# -- the end ----------------------------------------------------------------------------------------------------------


def test_hanging_storage_does_not_hold_up_the_end_and_the_region_keeps_what_it_has(
    serving: Start, image: Path, place: Path
) -> None:
    served = serving("serve", str(image), "--socket", str(place), "--inject", HANGS)
    with Guest(place) as guest:
        heads = [guest.write(sector, sector + 1) for sector in range(3)]
        taken(place, 3)
        begun = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - begun < PROMPT_S
        assert "3 requests that storage has not answered stay in the in-flight region" in served.log
        assert not place.exists()
        assert not Path(f"{place}.ctl").exists()
        assert guest.peer.closed_by_peer()
        assert guest.marked == heads
        serving("serve", str(image), "--socket", str(place))
        guest.connect()
        assert sorted(guest.answered(3)) == sorted(heads)
        assert [guest.status(sector) for sector in range(3)] == [OK] * 3
        assert [sector_of(image, sector)[0] for sector in range(3)] == [1, 2, 3]
        assert guest.marked == []


def test_without_a_region_storage_has_until_the_limit_and_what_is_lost_is_a_failure(
    serving: Start, image: Path, place: Path
) -> None:
    served = serving("serve", str(image), "--socket", str(place), "--inject", HANGS, "--stop-timeout", "1.5")
    with Guest(place, tracked=False) as guest:
        guest.write(0, 1)
        taken(place, 1)
        begun = time.monotonic()
        assert served.stop() == 1
        assert 1.5 <= time.monotonic() - begun < PROMPT_S
        assert guest.peer.closed_by_peer()
    assert "1 requests that storage has not answered are lost" in served.log
    assert not place.exists()


@pytest.mark.parametrize("tracked", [True, False])
def test_slow_storage_finishes_what_it_has_before_the_end(
    serving: Start, image: Path, place: Path, tracked: bool
) -> None:
    served = serving("serve", str(image), "--socket", str(place), "--inject", "delay-write=200ms")
    with Guest(place, tracked=tracked) as guest:
        heads = [guest.write(sector, sector + 1) for sector in range(3)]
        taken(place, 3)
        assert served.stop() == 0
        assert sorted(guest.answered(3)) == sorted(heads)
        assert [guest.status(sector) for sector in range(3)] == [OK] * 3
        if tracked:
            assert guest.marked == []
    assert "stopped" in served.log
    assert "not answered" not in served.log


def test_a_guest_that_has_left_while_its_storage_hangs_does_not_hold_up_the_end(
    serving: Start, image: Path, place: Path
) -> None:
    served = serving("serve", str(image), "--socket", str(place), "--inject", HANGS)
    with Guest(place) as guest:
        guest.write(0, 1)
        taken(place, 1)
    assert served.stop() == 0


def test_a_message_that_waits_for_storage_does_not_hold_up_the_end(serving: Start, image: Path, place: Path) -> None:
    served = serving("serve", str(image), "--socket", str(place), "--inject", HANGS)
    with Guest(place) as guest:
        guest.write(0, 1)
        taken(place, 1)
        guest.peer.send(FrontendRequest.GET_VRING_BASE, VringState(0, 0))
        assert not select.select([guest.peer.socket], [], [], 0.05)[0]
        assert served.stop() == 0
        assert len(guest.marked) == 1


# -- the fence --------------------------------------------------------------------------------------------------------


def test_a_successor_waits_for_the_image_with_one_line_and_serves_as_soon_as_it_is_free(
    serving: Start, image: Path, place: Path, tmp_path: Path
) -> None:
    first = serving("serve", str(image), "--socket", str(place))
    with starting("serve", str(image), "--socket", str(tmp_path / "other.sock")) as (process, lines):
        line_with(lines, "waiting up to 30 s for it: another program")
        assert not (tmp_path / "other.sock").exists(), "nobody connects to what would keep it waiting"
        assert first.stop() == 0
        line_with(lines, "serving")
        process.terminate()
        assert process.wait(WAIT_S) == 0


def test_a_second_writer_is_refused_when_the_wait_is_over(
    serving: Start, run: Run, image: Path, place: Path, tmp_path: Path
) -> None:
    serving("serve", str(image), "--socket", str(place))
    done = run("vhostuser", "serve", str(image), "--socket", str(tmp_path / "o.sock"), "--lock-timeout", "0.1")
    assert_one_line(done, 1)
    assert "another program" in done.stderr


def test_a_signal_ends_the_wait_for_the_image_at_once(serving: Start, image: Path, place: Path, tmp_path: Path) -> None:
    serving("serve", str(image), "--socket", str(place))
    with starting("serve", str(image), "--socket", str(tmp_path / "other.sock")) as (process, lines):
        line_with(lines, "waiting up to")
        process.terminate()
        assert process.wait(WAIT_S) == -signal.SIGTERM


def test_who_connects_to_an_inherited_socket_meanwhile_is_turned_away_and_served_later(
    serving: Start, image: Path, place: Path, tmp_path: Path
) -> None:
    first = serving("serve", str(image), "--socket", str(place))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "activated.sock"))
        listener.listen()
        number = listener.fileno()
        words = command_line("vhostuser", "serve", str(image), "--fd", str(number), "--control", "none")
        process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True, pass_fds=[number])
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            line_with(lines, "waiting up to")
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(WAIT_S)
                peer.connect(str(tmp_path / "activated.sock"))
                assert peer.recv(1) == b""
            assert first.stop() == 0
            line_with(lines, "serving")
            with Guest(tmp_path / "activated.sock") as guest:
                assert guest.read(0) == bytes(512)
        finally:
            process.kill()
            process.communicate()


def test_without_a_lock_there_is_no_fence_and_a_region_that_was_used_says_so_in_the_log(
    serving: Start, image: Path, place: Path
) -> None:
    served = serving("serve", str(image), "--socket", str(place), "--no-lock")
    with Guest(place) as guest:
        guest.write(0, 1)
        guest.answered(1)
        assert "without a lock" not in served.log
        served.kill()
        assert guest.peer.closed_by_peer()
        served = serving("serve", str(image), "--socket", str(place), "--no-lock")
        guest.connect()
        assert guest.read(0) == bytes([1]) * 512
    assert served.log.count("goes on where another one ended, without a lock") == 1


def test_killed_and_started_again_over_and_over_no_write_is_lost(serving: Start, image: Path, place: Path) -> None:
    served = serving("serve", str(image), "--socket", str(place))
    with Guest(place) as guest:
        for fill in range(1, 6):
            heads = [guest.write(sector, fill) for sector in range(8)]
            served.kill()
            assert guest.peer.closed_by_peer()
            served = serving("serve", str(image), "--socket", str(place), "--lock-timeout", "20")
            guest.connect()
            assert sorted(guest.answered(8)) == sorted(heads)
            assert [guest.status(sector) for sector in range(8)] == [OK] * 8
            assert [sector_of(image, sector)[511] for sector in range(8)] == [fill] * 8


# -- the hand-over ----------------------------------------------------------------------------------------------------


def test_a_successor_takes_the_very_sockets_and_removes_them_at_its_end(
    serving: Start, image: Path, place: Path
) -> None:
    line = ("serve", str(image), "--socket", str(place), "--queues", "2")
    first = serving(*line)
    files = [place.lstat().st_ino, Path(f"{place}.ctl").lstat().st_ino]
    with Guest(place) as guest:
        assert guest.read(0) == bytes(512)
        second = serving(*line, "--upgrade")
        assert first.process.wait(WAIT_S) == 0
        assert guest.peer.closed_by_peer()
        guest.connect()
        guest.write(5, 7)
        guest.answered(1)
        assert sector_of(image, 5) == bytes([7]) * 512
    assert [place.lstat().st_ino, Path(f"{place}.ctl").lstat().st_ino] == files
    with ControlClient(f"{place}.ctl") as client:
        found = client.call("disk.info")
        assert isinstance(found, dict)
        assert found["num_queues"] == 2
    third = serving(*line, "--upgrade")
    assert second.process.wait(WAIT_S) == 0
    assert third.stop() == 0
    assert not place.exists()
    assert not Path(f"{place}.ctl").exists()


def test_connecting_never_fails_during_upgrades(serving: Start, image: Path, place: Path) -> None:
    line = ("serve", str(image), "--socket", str(place), "--queues", "1")
    served = serving(*line)
    over = threading.Event()
    failures: list[VhostUserError] = []
    connections = 0

    def connect_again_and_again() -> None:
        nonlocal connections
        while not over.is_set():
            try:
                connect(str(place), WAIT_S).close()
                connections += 1
            except VhostUserError as error:
                failures.append(error)

    thread = threading.Thread(target=connect_again_and_again)
    thread.start()
    try:
        for _ in range(3):
            successor = serving(*line, "--upgrade")
            assert served.process.wait(WAIT_S) == 0
            served = successor
    finally:
        over.set()
        thread.join()
    assert failures == []
    assert connections > 100


class Work:
    """A guest that writes, on a thread of its own, whoever serves it, and looks at what is stored after each round."""

    def __init__(self, place: Path, image: Path) -> None:
        self.guest = Guest(place)
        self.image = image
        self.rounds = self.connections = 0
        self.failures: list[BaseException] = []
        self._more = threading.Condition()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._round(self.rounds % 255 + 1)
        except BaseException as error:
            self.failures.append(error)
        with self._more:
            self._more.notify_all()

    def _round(self, fill: int) -> None:
        for sector in range(8):
            self.guest.write(sector, fill)
        self.connections += self.guest.answered_by_anyone(8)
        assert [self.guest.status(sector) for sector in range(8)] == [OK] * 8
        assert [sector_of(self.image, sector) for sector in range(8)] == [bytes([fill]) * 512] * 8
        with self._more:
            self.rounds += 1
            self._more.notify_all()

    def wait(self, rounds: int) -> None:
        """Wait for so many more rounds."""
        with self._more:
            wanted = self.rounds + rounds
            assert self._more.wait_for(lambda: self.rounds >= wanted or self.failures, WAIT_S)
        assert self.failures == []

    def end(self) -> None:
        """Finish the round, and see that nothing is left."""
        self._over.set()
        self._thread.join(WAIT_S)
        assert self.failures == []
        assert (self.guest.marked, self.guest.ring.driver.outstanding) == ([], 0)
        self.guest.close()


ROUNDS = int(os.environ.get("RESTART_ROUNDS", "2"))
"""How often what is tried under load is done; `make restarts` does it more often."""


@pytest.mark.parametrize("inject", ["delay-write=0ms", "delay-write=2ms"], ids=["fast", "slow"])
def test_upgrades_in_a_row_under_load_lose_and_repeat_nothing(
    serving: Start, image: Path, place: Path, inject: str
) -> None:
    line = ("serve", str(image), "--socket", str(place), "--queues", "1", "--inject", inject)
    served = serving(*line)
    work = Work(place, image)
    for _ in range(ROUNDS):
        work.wait(3)
        successor = serving(*line, "--upgrade")
        assert served.process.wait(WAIT_S) == 0
        served = successor
    work.wait(3)
    work.end()
    assert work.connections == ROUNDS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_restarts_in_a_row_under_load_lose_and_repeat_nothing(
    serving: Start, image: Path, place: Path, number: int
) -> None:
    line = ("serve", str(image), "--socket", str(place), "--queues", "1", "--inject", "delay-write=2ms")
    served = serving(*line)
    work = Work(place, image)
    for _ in range(ROUNDS):
        work.wait(3)
        assert served.stop(number) == (0 if number == signal.SIGTERM else -number)
        served = serving(*line)
    work.wait(3)
    work.end()


def test_requests_under_way_are_done_before_the_hand_over(serving: Start, image: Path, place: Path) -> None:
    line = ("serve", str(image), "--socket", str(place), "--queues", "1")
    first = serving(*line, "--inject", "delay-write=300ms")
    with Guest(place) as guest:
        heads = [guest.write(sector, 9) for sector in range(4)]
        taken(place, 4)
        serving(*line, "--upgrade")
        assert first.process.wait(WAIT_S) == 0
        assert sorted(guest.answered(4)) == sorted(heads)
        assert guest.marked == []
        assert [sector_of(image, sector)[0] for sector in range(4)] == [9] * 4


def test_a_request_that_is_held_goes_to_the_successor_in_the_region(serving: Start, image: Path, place: Path) -> None:
    line = ("serve", str(image), "--socket", str(place), "--queues", "1", "--on-error", "hold")
    first = serving(*line, "--inject", "error-write=1")
    with Guest(place) as guest:
        guest.write(2, 6)
        taken(place, 1)
        serving(*line, "--upgrade")
        assert first.process.wait(WAIT_S) == 0
        guest.connect()
        guest.answered(1)
        assert (guest.status(2), guest.marked) == (OK, [])
    assert sector_of(image, 2) == bytes([6]) * 512


def test_storage_that_hangs_keeps_the_disk_where_it_is_and_the_guest_does_not_notice(
    serving: Start, run: Run, image: Path, place: Path
) -> None:
    line = ("serve", str(image), "--socket", str(place), "--queues", "1")
    first = serving(*line, "--inject", HANGS)
    with Guest(place) as guest:
        (head,) = [guest.write(0, 9)]
        taken(place, 1)
        done = run("vhostuser", *line, "--upgrade", "--stop-timeout", "0.2")
        assert_one_line(done, 1)
        assert "the running server keeps it: 1 requests are still under way after 0.2 s" in done.stderr
        assert guest.read(3) == bytes(512)
        assert guest.marked == [head]
        assert "serving on" in first.log
        with pytest.raises(ControlError), ControlClient(f"{place}.ctl") as client:
            client.call("server.leave")
        assert guest.read(4) == bytes(512)
        assert first.stop() == 0


def test_a_successor_that_dies_before_the_end_of_the_hand_over_leaves_everything_as_it_was(
    serving: Start, image: Path, place: Path
) -> None:
    first = serving("serve", str(image), "--socket", str(place), "--queues", "1")
    with Guest(place) as guest:
        client = ControlClient(f"{place}.ctl")
        client.call("server.handover", timeout_s=5)
        guest.write(0, 3)  # nobody takes it
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(place))  # it queues
        with ControlClient(f"{place}.ctl") as other, pytest.raises(ControlError, match="handed over already"):
            other.call("server.handover", timeout_s=5)
        assert guest.status(0) == 255
        client.close()
        guest.answered(1)
        assert guest.status(0) == OK
        assert guest.read(0) == bytes([3]) * 512
    assert "the successor has gone without taking over: serving on" in first.log
    assert first.stop() == 0


@pytest.mark.parametrize(
    ("more", "exit_code", "said"),
    [
        (("--queues", "1"), 2, "it has 2 queues, here it would be 1"),
        (("--read-only",), 2, "its read-only is False, here it would be True"),
        (("--block-size", "4096"), 2, "its block size is 512, here it would be 4096"),
        (("--engine", "nothing"), 2, "--engine"),
        (("--inject", "delay-read=never"), 2, "inject"),
        (("--control", "none"), 2, "--upgrade: it needs the control socket"),
        (("--control", "{place}.no"), 1, "no server to take over from"),
        (("--socket-mode", "0999"), 2, "--socket-mode"),
    ],
)
def test_a_successor_that_does_not_fit_is_one_line_and_the_running_one_serves_on(
    serving: Start, run: Run, image: Path, place: Path, more: tuple[str, ...], exit_code: int, said: str
) -> None:
    first = serving("serve", str(image), "--socket", str(place), "--queues", "2")
    with Guest(place) as guest:
        words = [word.format(place=place) for word in more]
        done = run("vhostuser", "serve", str(image), "--socket", str(place), "--queues", "2", "--upgrade", *words)
        assert_one_line(done, exit_code)
        assert said in done.stderr
        assert guest.read(0) == bytes(512)
    assert first.stop() == 0


def test_a_successor_is_not_taken_for_another_socket(
    serving: Start, run: Run, image: Path, place: Path, tmp_path: Path
) -> None:
    first = serving("serve", str(image), "--socket", str(place), "--control", f"{place}.ctl")
    other = str(tmp_path / "other.sock")
    for words in (("--socket", other, "--control", f"{place}.ctl"), ("--control", f"{place}.ctl")):
        done = run("vhostuser", "serve", str(image), *words, "--upgrade")
        assert_one_line(done, 2)
        assert "--socket" in done.stderr
    with Guest(place) as guest:
        assert guest.read(0) == bytes(512)
    assert first.stop() == 0


def test_a_disk_in_memory_is_not_handed_over(serving: Start, run: Run, place: Path) -> None:
    first = serving("serve", "memory:size=1M", "--socket", str(place))
    done = run("vhostuser", "serve", "memory:size=1M", "--socket", str(place), "--upgrade")
    assert_one_line(done, 2)
    assert "its content ends with the running server" in done.stderr
    assert first.stop() == 0


def test_an_inherited_listening_socket_is_handed_over_too(serving: Start, image: Path, tmp_path: Path) -> None:
    place, control = tmp_path / "given.sock", str(tmp_path / "given.ctl")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        number = listener.fileno()
        first = serving("serve", str(image), "--fd", str(number), "--control", control, pass_fds=[number])
    second = serving("serve", str(image), "--control", control, "--upgrade")
    assert first.process.wait(WAIT_S) == 0
    with Guest(place) as guest:
        assert guest.read(0) == bytes(512)
    assert second.stop() == 0
    assert place.exists(), "whoever made it removes it"
    assert not Path(control).exists()


def test_the_hand_over_is_a_call_with_two_descriptors(serving: Start, image: Path, place: Path) -> None:
    serving("serve", str(image), "--socket", str(place))
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(WAIT_S)
        peer.connect(f"{place}.ctl")
        peer.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "server.handover"}\n')
        data, fds, _, _ = socket.recv_fds(peer, 4096, 4)
        for fd in fds:
            os.close(fd)
    sockets = json.loads(data)["result"]["sockets"]
    assert [one["name"] for one in sockets] == ["disk", "control"]
    assert len(fds) == 2
    assert sockets[0]["file"] == [place.lstat().st_dev, place.lstat().st_ino]
