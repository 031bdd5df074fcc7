"""The sandbox of a serving process: what it can no longer do, on which threads, for whom, and what is said of it."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import WAIT_S, Run, Serving, command_line, environment
from .test_failures import assert_one_line
from .test_serve import connected, features, info

Start = Callable[..., Serving]

ENFORCED = "no system call but those of serving (seccomp)"
UNPRIVILEGED = 65534


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of 8 MiB."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 8 << 20)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where to serve."""
    return tmp_path / "disk.sock"


def statuses(pid: int) -> list[dict[str, str]]:
    """What the kernel says about every thread of a process."""
    found = []
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        lines = status.read_text().splitlines()
        found.append({name: value.strip() for name, _, value in (line.partition(":") for line in lines)})
    return found


def seccomp_works() -> bool:
    """Whether this kernel filters system calls at all."""
    return Path("/proc/sys/kernel/seccomp/actions_avail").exists()


needs_seccomp = pytest.mark.skipif(not seccomp_works(), reason="this kernel has no seccomp")


@needs_seccomp
@pytest.mark.parametrize("engine", ["auto", "syscalls"])
def test_every_thread_of_a_serving_process_is_restricted(serving: Start, image: Path, place: Path, engine: str) -> None:
    served = serving(
        *("serve", str(image), "--socket", str(place), "--queues", "2", "--threads", "2", "--engine", engine)
    )
    with connected(place) as peer:
        features(peer)
        assert info(place)["disk"] == str(image)
        found = statuses(served.process.pid)
        names = {status["Name"] for status in found}
        assert {"vhost-queue-0", "vhost-queue-1"} <= names
        assert len(found) >= 6, "main, two workers, server, session, control"
        for status in found:
            assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1"), status["Name"]
    assert ENFORCED in served.log
    assert served.stop() == 0
    assert not place.exists()


def test_without_a_sandbox_nothing_is_restricted(serving: Start, image: Path, place: Path) -> None:
    before = next(status["Seccomp"] for status in statuses(os.getpid()))
    for words in (("--no-sandbox",), ("--sandbox", "off")):
        served = serving("serve", str(image), "--socket", str(place), *words)
        assert {status["Seccomp"] for status in statuses(served.process.pid)} == {before}
        assert "sandbox: off" in served.log
        assert served.stop() == 0


@needs_seccomp
def test_the_back_end_program_has_the_sandbox_too(serving: Start, image: Path, place: Path) -> None:
    words = (f"--socket-path={place}", f"--blk-file={image}")
    served = serving(*words, program="vhost-user-blk")
    assert {status["Seccomp"] for status in statuses(served.process.pid)} == {"2"}
    assert served.stop() == 0
    served = serving(*words, "--no-sandbox", program="vhost-user-blk")
    assert "sandbox: off" in served.log


ATTEMPTS = """
import ctypes, json, mmap, os, signal, socket, sys, threading
from vhostuser import systemd
from vhostuser.cli import logs
from vhostuser.cli.service import Service

image, place, results = sys.argv[1:]
told = open(results, "w")
libc = ctypes.CDLL(None, use_errno=True)
IO_URING_SETUP, IO_URING_REGISTER = 425, 427
listener = socket.create_server(("127.0.0.1", 0))
port = socket.socket()

def call(number):
    if libc.syscall(number, -1, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "")

ATTEMPTS = {
    "open": lambda: open("/etc/passwd"),
    "open the image": lambda: os.open(image, os.O_RDONLY),
    "make a file": lambda: os.open(place + ".new", os.O_CREAT | os.O_WRONLY),
    "list": lambda: os.listdir("/"),
    "rename": lambda: os.rename(image, image + ".old"),
    "truncate": lambda: os.truncate(image, 0),
    "link": lambda: os.symlink(image, place + ".link"),
    "change the mode": lambda: os.chmod(image, 0o777),
    "socket": lambda: socket.socket(socket.AF_INET),
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "connect": lambda: port.connect(listener.getsockname()),
    "execute": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "signal": lambda: os.kill(os.getppid(), 0),
    "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "io_uring_setup": lambda: call(IO_URING_SETUP),
    "io_uring_register": lambda: call(IO_URING_REGISTER),
}

def attempt():
    found = {}
    for name, try_it in ATTEMPTS.items():
        try:
            try_it()
            found[name] = 0
        except OSError as error:
            found[name] = error.errno
    return found

class Manager(systemd.Manager):
    def notify(self, state):
        if state == systemd.READY:
            everything = [attempt()]
            thread = threading.Thread(target=lambda: everything.append(attempt()))
            thread.start()
            thread.join()
            json.dump(everything, told)
            told.close()
        return super().notify(state)

systemd.Manager = Manager
logs.configure("text", verbose=False)
Service(disk=image, socket=place, queues=1).run()
"""


@needs_seccomp
def test_what_serving_does_not_need_is_refused_on_every_thread(
    serving: Start, image: Path, place: Path, tmp_path: Path
) -> None:
    results = tmp_path / "attempts"
    served = serving(words=[sys.executable, "-c", ATTEMPTS, str(image), str(place), str(results)])
    tried = json.loads(results.read_text())
    assert len(tried) == 2
    for found in tried:
        assert {name: errno.errorcode.get(number, number) for name, number in found.items()} == dict.fromkeys(
            found, "EPERM"
        )
    with connected(place) as peer:
        assert features(peer)
    assert served.stop() == 0


PLAIN_USER = """
import ctypes, os, sys
import importlib.metadata, vhostuser.control
import vhostuser.cli.logs, vhostuser.cli.main, vhostuser.cli.serve, vhostuser.cli.service
importlib.metadata.version("vhostuser")  # the interpreter may lie where others see nothing
os.chown(os.environ["NOTIFY_SOCKET"], int(sys.argv[1]), -1)
os.setgroups([])
os.setresgid(*[int(sys.argv[1])] * 3)
os.setresuid(*[int(sys.argv[1])] * 3)
PR_SET_DUMPABLE = 4  # as a process that was never root
ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
sys.argv[1:] = sys.argv[2:]
vhostuser.cli.main.main()
"""


@needs_seccomp
@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes somebody else; for others every test is this one")
def test_a_plain_user_has_the_sandbox_too(serving: Start, image: Path, place: Path) -> None:
    directory = image.parent
    os.chown(image, UNPRIVILEGED, UNPRIVILEGED)
    os.chown(directory, UNPRIVILEGED, UNPRIVILEGED)
    for above in (directory.parent, directory.parent.parent):
        above.chmod(above.stat().st_mode | 0o011)
    words = [sys.executable, "-c", PLAIN_USER, str(UNPRIVILEGED), "serve", str(image), "--socket", str(place)]
    served = serving(words=words, variables={"PYTHONWARNINGS": ""})
    found = statuses(served.process.pid)
    assert {(status["Uid"].split()[0], status["Seccomp"]) for status in found} == {(str(UNPRIVILEGED), "2")}
    assert info(place)["disk"] == str(image)
    assert served.stop() == 0
    assert not place.exists()


WITHOUT = """
import ctypes, os, struct, sys

RETURN, LOAD, EQUAL = 0x06, 0x20, 0x15
code = [struct.pack("HBBI", LOAD, 0, 0, 0)]
for number in map(int, sys.argv[1].split(",")):
    code += [struct.pack("HBBI", EQUAL, 0, 1, number), struct.pack("HBBI", RETURN, 0, 0, 0x50000 | 38)]  # ENOSYS
code.append(struct.pack("HBBI", RETURN, 0, 0, 0x7FFF0000))
program = ctypes.create_string_buffer(b"".join(code))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
whole = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(program)))
assert libc.prctl(22, 2, whole, 0, 0) == 0
os.execv(sys.argv[2], sys.argv[2:])
"""
SECCOMP = {"x86_64": 317, "aarch64": 277}
LANDLOCK_CREATE_RULESET = 444


def on_a_kernel_without(*calls: int) -> list[str]:
    """Words to begin a command line with: it runs where these system calls do not exist."""
    return [sys.executable, "-c", WITHOUT, ",".join(map(str, calls))]


@needs_seccomp
def test_a_kernel_without_landlock_is_told_of_and_served_on(serving: Start, image: Path, place: Path) -> None:
    words = command_line("vhostuser", "serve", str(image), "--socket", str(place))
    served = serving(words=on_a_kernel_without(LANDLOCK_CREATE_RULESET) + words)
    assert f"warning vhostuser.sandbox: sandbox: {ENFORCED}. Not enforced here: files stay reachable, Landlock: " in (
        served.log
    )
    with connected(place) as peer:
        assert features(peer)
    assert served.stop() == 0


@needs_seccomp
def test_a_kernel_that_enforces_nothing_is_told_of_and_served_on(serving: Start, image: Path, place: Path) -> None:
    words = command_line("vhostuser", "serve", str(image), "--socket", str(place))
    gone = on_a_kernel_without(LANDLOCK_CREATE_RULESET, SECCOMP[platform.machine()])
    served = serving(words=gone + words)
    assert "sandbox: nothing is enforced. Not enforced here: files" in served.log
    assert served.stop() == 0


@needs_seccomp
@pytest.mark.parametrize("missing", [LANDLOCK_CREATE_RULESET, SECCOMP[platform.machine()]])
def test_a_sandbox_that_is_required_and_cannot_be_had_is_one_line(image: Path, place: Path, missing: int) -> None:
    words = command_line("vhostuser", "serve", str(image), "--socket", str(place), "--sandbox", "require")
    done = subprocess.run(
        on_a_kernel_without(missing) + words,
        env=environment(), capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.stderr.endswith("Use --sandbox on, or another kernel.\n")
    done.stderr = done.stderr.splitlines(keepends=True)[-1]
    assert_one_line(done, 1)
    assert not place.exists()


def test_a_mode_that_is_none_is_refused(run: Run, image: Path, place: Path) -> None:
    assert_one_line(run("vhostuser", "serve", str(image), "--socket", str(place), "--sandbox", "maybe"), 2)


def test_threads_that_were_there_before_are_told_of() -> None:
    program = (
        "import logging, threading\n"
        "from vhostuser.sandbox import Sandbox\n"
        "logging.basicConfig()\n"
        "over = threading.Event()\n"
        "threading.Thread(target=over.wait).start()\n"
        "sandbox = Sandbox()\n"
        "sandbox.give_up_files([None, '@abstract'])\n"
        "sandbox.give_up_calls()\n"
        "over.set()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    if "Landlock:" not in done.stderr:
        assert "1 threads that were there before still reach files" in done.stderr
