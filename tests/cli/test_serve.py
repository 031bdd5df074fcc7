"""`vhostuser serve` and the commands that ask it, as real processes."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostuser import ControlClient

from .conftest import WAIT_S, Run, Serving, command_line
from .test_failures import assert_one_line

Start = Callable[..., Serving]

MIB = 1 << 20
RO = 1 << 5


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


def connected(place: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(WAIT_S)
    peer.connect(str(place))
    return peer


def features(peer: socket.socket) -> int:
    """GET_FEATURES and its answer."""
    peer.sendall(struct.pack("=III", 1, 1, 0))
    answer = peer.recv(20, socket.MSG_WAITALL)
    request, flags, size, value = struct.unpack("=IIIQ", answer)
    assert (request, flags, size) == (1, 5, 8)
    return int(value)


def info(place: Path) -> dict[str, object]:
    with ControlClient(f"{place}.ctl") as client:
        found = client.call("disk.info")
    assert isinstance(found, dict)
    return found


def is_readable(peer: socket.socket) -> bool:
    return bool(select.select([peer], [], [], WAIT_S)[0])


def test_both_sockets_are_private_and_go_away_at_the_end(serving: Start, image: Path, place: Path) -> None:
    served = serving("serve", str(image), "--socket", str(place))
    for path in (place, Path(f"{place}.ctl")):
        assert stat.filemode(path.lstat().st_mode) == "srw-------"
    assert served.stop() == 0
    assert not place.exists()
    assert not Path(f"{place}.ctl").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_while_a_front_end_is_connected(
    serving: Start, image: Path, place: Path, number: int
) -> None:
    served = serving("serve", str(image), "--socket", str(place))
    with connected(place) as peer:
        features(peer)
        assert served.stop(number) == 0
        assert peer.recv(1) == b""
    assert "Traceback" not in served.log


def test_it_listens_again_after_a_front_end_has_left(serving: Start, image: Path, place: Path) -> None:
    serving("serve", str(image), "--socket", str(place))
    for _ in range(3):
        with connected(place) as peer:
            assert features(peer) & 1 << 32


def test_exit_on_disconnect_ends_with_the_first_front_end(serving: Start, image: Path, place: Path) -> None:
    served = serving("serve", str(image), "--socket", str(place), "--exit-on-disconnect")
    with connected(place) as peer:
        features(peer)
    assert served.process.wait(WAIT_S) == 0


def test_options_of_the_disk_arrive(serving: Start, image: Path, place: Path) -> None:
    serving(
        *("serve", str(image), "--socket", str(place), "--queues", "3", "--threads", "2", "--read-only"),
        *("--block-size", "4K", "--physical-block-size", "8192", "--cache", "writethrough", "--engine", "syscalls"),
        *("--serial", "S-1", "--seg-max", "62", "--poll-us", "5", "--no-lock", "--socket-mode", "0660"),
    )
    assert stat.filemode(place.lstat().st_mode) == "srw-rw----"
    found = info(place)
    expected = {
        "disk": str(image),
        "size": 8 * MIB,
        "num_queues": 3,
        "read_only": True,
        "block_size": 4096,
        "physical_block_size": 8192,
        "engine": "syscalls",
    }
    assert {key: found[key] for key in expected} == expected
    with connected(place) as peer:
        assert features(peer) & RO


def test_resize_changes_the_disk_and_says_who_was_told(serving: Start, run: Run, image: Path, place: Path) -> None:
    serving("serve", str(image), "--socket", str(place))
    done = run("vhostuser", "resize", str(place), "16M")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{16 * MIB} bytes: no guest is connected; the next one sees the change\n"
    assert image.stat().st_size == info(place)["size"] == 16 * MIB
    assert run("vhostuser", "resize", str(place), "1M").returncode == 0
    assert image.stat().st_size == info(place)["size"] == MIB
    os.truncate(image, 3 * MIB)
    assert run("vhostuser", "resize", str(place)).stdout.startswith(f"{3 * MIB} bytes: ")
    assert info(place)["size"] == 3 * MIB


def test_a_size_that_makes_no_sense_is_told_by_the_one_who_asked(
    serving: Start, run: Run, image: Path, place: Path
) -> None:
    serving("serve", str(image), "--socket", str(place))
    assert_one_line(run("vhostuser", "resize", str(place), "much"), 2)
    assert_one_line(run("vhostuser", "resize", str(place), "1"), 2)
    assert image.stat().st_size == 8 * MIB


def test_sighup_looks_at_the_size_of_the_file_again(serving: Start, image: Path, place: Path) -> None:
    served = serving("serve", str(image), "--socket", str(place))
    os.truncate(image, 24 * MIB)
    served.process.send_signal(signal.SIGHUP)
    # A control call is no barrier for a signal, but the end is: the signal that came first is obeyed first.
    assert served.stop() == 0
    assert f"the disk has {24 * MIB} bytes now" in served.log


def test_stats_are_one_json_object_with_a_queue_each(serving: Start, run: Run, image: Path, place: Path) -> None:
    serving("serve", str(image), "--socket", str(place), "--queues", "2")
    done = run("vhostuser", "stats", str(place), "--json")
    found = json.loads(done.stdout)
    assert found["disk"] == str(image)
    assert [queue["reads"] for queue in found["queues"]] == [0, 0]
    assert {"writes", "errors", "in_flight", "oldest_age_us", "notifications_suppressed"} <= set(found["queues"][0])


def test_stats_for_people_are_a_table(serving: Start, run: Run, image: Path, place: Path) -> None:
    serving("serve", str(image), "--socket", str(place), "--queues", "2")
    done = run("vhostuser", "stats", str(place))
    assert (done.returncode, done.stderr) == (0, "")
    assert "queue 1" in done.stdout
    assert "read_bytes" in done.stdout


def test_print_config_asks_the_running_disk_for_its_queues(serving: Start, run: Run, image: Path, place: Path) -> None:
    serving("serve", str(image), "--socket", str(place), "--queues", "5")
    assert "num-queues=5" in run("vhostuser", "print-config", str(place), "--for", "qemu").stdout


def test_json_logs_are_one_object_per_line(serving: Start, image: Path, place: Path) -> None:
    served = serving("serve", str(image), "--socket", str(place), "--log-format", "json", "-v")
    with connected(place) as peer:
        features(peer)
    assert served.stop() == 0
    entries = [json.loads(line) for line in served.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in entries)
    assert any("serving" in entry["message"] for entry in entries)


def test_an_inherited_listening_socket_has_no_control_socket(serving: Start, image: Path, place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        served = serving("serve", str(image), "--fd", str(listener.fileno()), pass_fds=[listener.fileno()])
    for _ in range(2):
        with connected(place) as peer:
            features(peer)
    assert not Path(f"{place}.ctl").exists()
    assert "no control socket" in served.log
    assert served.stop() == 0
    assert place.exists(), "it did not make the socket's file, so it does not remove it"


def test_an_inherited_connection_is_served_to_its_end(serving: Start, image: Path, place: Path, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            served = serving(
                *("serve", str(image), "--fd", str(theirs.fileno()), "--control", f"{place}.ctl"),
                pass_fds=[theirs.fileno()],
            )
        ours.settimeout(WAIT_S)
        features(ours)
        assert info(place)["disk"] == str(image)
    assert served.process.wait(WAIT_S) == 0


def test_a_socket_of_the_service_manager_is_served(serving: Start, image: Path, place: Path) -> None:
    activate = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="vhost")
os.execv(sys.argv[2], sys.argv[2:])
"""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        number = listener.fileno()
        words = [sys.executable, "-c", activate, str(number), *command_line("vhostuser", "serve", str(image))]
        served = serving(words=words, pass_fds=[number])
    with connected(place) as peer:
        features(peer)
    assert "the service manager's socket vhost" in served.log
    assert served.stop() == 0


def test_no_control_socket_when_none_is_wanted(serving: Start, image: Path, place: Path, run: Run) -> None:
    serving("serve", str(image), "--socket", str(place), "--control", "none")
    assert not Path(f"{place}.ctl").exists()
    done = run("vhostuser", "stats", str(place))
    assert_one_line(done, 1)
    assert "it has no control socket beside it" in done.stderr


def test_a_path_too_long_for_its_control_socket_is_served_without(serving: Start, image: Path, tmp_path: Path) -> None:
    place = tmp_path / ("s" * (107 - len(os.fsencode(tmp_path)) - 1))
    served = serving("serve", str(image), "--socket", str(place))
    with connected(place) as peer:
        features(peer)
    assert "is too long, name one with --control PATH" in served.log
    assert not Path(f"{place}.ctl").exists()


def test_memory_and_null_disks_are_served(serving: Start, place: Path) -> None:
    for disk in ("memory:size=4M", "null:size=1T"):
        served = serving("serve", disk, "--socket", str(place))
        with connected(place) as peer:
            assert features(peer) & 1 << 32
        assert served.stop() == 0


def test_a_second_front_end_is_refused_at_once(serving: Start, image: Path, place: Path) -> None:
    served = serving("serve", str(image), "--socket", str(place))
    with connected(place) as first:
        features(first)
        with connected(place) as second:
            assert is_readable(second)
            assert second.recv(1) == b""
        assert features(first)
    assert "a front-end was refused" in served.log


def test_a_stale_socket_is_replaced(serving: Start, image: Path, place: Path) -> None:
    serving("serve", str(image), "--socket", str(place)).kill()
    assert place.exists()
    serving("serve", str(image), "--socket", str(place))
    with connected(place) as peer:
        features(peer)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("{image}",), 2, "socket: none is named"),
        (("{image}", "--socket", "{place}", "--fd", "0"), 2, "--fd: it excludes --socket"),
        (("{image}", "--fd", "0"), 2, "file descriptor 0: "),
        (("{image}", "--fd", "77"), 2, "file descriptor 77: it is not open"),
        (("{image}.not", "--socket", "{place}"), 1, "{image}.not: cannot be opened"),
        (("{image}/..", "--socket", "{place}"), 1, "{image}/..: "),
        (("/", "--socket", "{place}"), 1, "/: it is a directory"),
        (("memory:much", "--socket", "{place}"), 2, "disk 'memory:much'"),
        (("{image}", "--socket", "{image}"), 1, "{image}: there is a file that is no socket"),
        (("{image}", "--socket", "/nowhere/x.sock"), 1, "/nowhere/x.sock: "),
        (("{image}", "--socket", "{place}" + 108 * "x"), 2, "socket paths have at most 107 bytes"),
        (("{image}", "--socket", "{place}", "--control", "{place}" + 108 * "x"), 2, "at most 107 bytes"),
        (("{image}", "--socket", "{place}", "--queues", "0"), 2, "queues 0: "),
        (("{image}", "--socket", "{place}", "--queues", "257"), 2, "queues 257: "),
        (("{image}", "--socket", "{place}", "--queues", "2", "--threads", "3"), 2, "threads 3: "),
        (("{image}", "--socket", "{place}", "--block-size", "1000"), 2, "block-size 1000: "),
        (("{image}", "--socket", "{place}", "--block-size", "big"), 2, "size 'big': "),
        (("{image}", "--socket", "{place}", "--serial", 21 * "x"), 2, "serial '"),
        (("{image}", "--socket", "{place}", "--cache", "lots"), 2, "--cache: 'lots' is not one of"),
        (("{image}", "--socket", "{place}", "--inject", "delay-read=never"), 2, "inject 'delay-read=never'"),
        (("{image}", "--socket", "{place}", "--socket-mode", "0999"), 2, "--socket-mode: 0999 is no mode in octal"),
        (("{image}", "--socket", "{place}", "--socket-group", "no-such-group"), 2, "group no-such-group: "),
    ],
)
def test_what_cannot_be_served_is_one_line(
    run: Run, image: Path, place: Path, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    names = {"image": str(image), "place": str(place)}
    done = run("vhostuser", "serve", *(word.format(**names) for word in arguments))
    assert_one_line(done, exit_code)
    assert said.format(**names) in done.stderr
    assert not place.exists()


def test_serving_an_image_twice_is_refused(serving: Start, run: Run, image: Path, place: Path, tmp_path: Path) -> None:
    serving("serve", str(image), "--socket", str(place))
    other = str(tmp_path / "other.sock")
    assert_one_line(run("vhostuser", "serve", str(image), "--socket", other, "--lock-timeout", "0"), 1)


def test_serving_on_a_socket_in_use_is_refused(serving: Start, run: Run, image: Path, place: Path) -> None:
    serving("serve", str(image), "--socket", str(place))
    done = run("vhostuser", "serve", "memory:size=1M", "--socket", str(place))
    assert_one_line(done, 1)
    with connected(place) as peer:
        features(peer)


@pytest.mark.parametrize("form", ["separate", "joined"])
def test_the_back_end_program_serves_with_both_forms_of_its_options(
    serving: Start, image: Path, place: Path, form: str
) -> None:
    options = {"--socket-path": str(place), "--blk-file": str(image)}
    if form == "joined":
        words = [f"{name}={value}" for name, value in options.items()]
    else:
        words = [word for pair in options.items() for word in pair]
    served = serving(*words, "--read-only", program="vhost-user-blk")
    with connected(place) as peer:
        assert features(peer) & RO
    assert not Path(f"{place}.ctl").exists()
    assert served.stop() == 0
    assert not place.exists()


def test_the_back_end_program_serves_an_inherited_connection(serving: Start, image: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            served = serving(
                *(f"--fd={theirs.fileno()}", f"--blk-file={image}"),
                program="vhost-user-blk",
                pass_fds=[theirs.fileno()],
            )
        ours.settimeout(WAIT_S)
        assert not features(ours) & RO
    assert served.process.wait(WAIT_S) == 0


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("--socket-path={place}",), 2, "--blk-file: missing"),
        (("--blk-file={image}",), 2, "socket: none is named. Say --socket-path PATH"),
        (("--blk-file={image}", "--socket-path={place}", "--fd=0"), 2, "--fd: it excludes --socket-path"),
        (("--blk-file=memory:size=1M", "--socket-path={place}"), 1, "memory:size=1M: cannot be opened"),
        (("--blk-file={image}", "--socket-path={place}", "--colour"), 2, "--colour: no such option"),
    ],
)
def test_the_back_end_program_fails_early_and_says_why(
    run: Run, image: Path, place: Path, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    names = {"image": str(image), "place": str(place)}
    done = run("vhost-user-blk", *(word.format(**names) for word in arguments))
    assert_one_line(done, exit_code)
    assert said in done.stderr
