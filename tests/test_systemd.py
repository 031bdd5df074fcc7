"""systemd's two protocols, with the other side played by a socket and an environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vhostuser import systemd
from vhostuser.errors import UsageError

NAMES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


@pytest.fixture(autouse=True)
def _no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("abstract", [False, True])
def test_notices_reach_the_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@vhostuser-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with systemd.Manager() as connection:
            monkeypatch.delenv("NOTIFY_SOCKET")
            assert connection.notify(systemd.READY)
            assert connection.notify(systemd.STOPPING)
        assert not connection.notify(systemd.READY)
        assert [manager.recv(100), manager.recv(100)] == [b"READY=1", b"STOPPING=1"]


def test_without_a_manager_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (None, "", "vsock:2:1234", str(tmp_path / "nobody")):
        if address is not None:
            monkeypatch.setenv("NOTIFY_SOCKET", address)
        with systemd.Manager() as connection:
            assert not connection.notify(systemd.READY)


def test_a_manager_that_has_gone_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        connection = systemd.Manager()
    with connection:
        assert not connection.notify(systemd.READY)


PROGRAM = """
import os, sys
from vhostuser import systemd
os.environ["LISTEN_PID"] = sys.argv[1].replace("me", str(os.getpid()))
if sys.argv[2]:
    own = os.fstat(os.pidfd_open(os.getpid())).st_ino
    os.environ["LISTEN_PIDFDID"] = str(own + int(sys.argv[2]))
passed = systemd.passed_fds()
print([(one.fd.fileno(), one.name, os.get_inheritable(one.fd.fileno())) for one in passed])
print([name for name in os.environ if name.startswith("LISTEN_")], systemd.passed_fds())
"""


def activated(pid: str, pidfd_shift: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program with two pipes as descriptors 3 and 4, as a manager would."""
    reader, writer = os.pipe()
    command = f'exec 3<&{reader} 4>&{writer} "$0" "$@"'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, "-c", PROGRAM, pid, pidfd_shift],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        pass_fds=(reader, writer), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_passed_descriptors_are_taken_once_and_not_inherited_further() -> None:
    found = activated("me", "", LISTEN_FDS="2", LISTEN_FDNAMES="disk:control")
    assert found.stdout.splitlines() == ["[(3, 'disk', False), (4, 'control', False)]", "[] []"], found.stderr


def test_descriptors_without_names_are_unknown() -> None:
    assert "[(3, 'unknown', False)]" in activated("me", "", LISTEN_FDS="1").stdout


def test_the_pidfd_has_to_be_ours_too() -> None:
    assert "(3, 'unknown'" in activated("me", "0", LISTEN_FDS="1").stdout
    assert activated("me", "1", LISTEN_FDS="1").stdout.startswith("[]")


def test_descriptors_for_another_process_are_left_alone() -> None:
    assert activated("1", "", LISTEN_FDS="2").stdout.splitlines() == ["[]", "[] []"]
    assert systemd.passed_fds() == []


@pytest.mark.parametrize("count", ["two", "-1", "99999"])
def test_a_count_that_cannot_be_true_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    with pytest.raises(UsageError, match="LISTEN_FDS"):
        systemd.passed_fds()
