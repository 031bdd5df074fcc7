"""Socket files, abstract names and inherited descriptors."""

from __future__ import annotations

import grp
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostuser.errors import OperatorError, PeerGone, UsageError
from vhostuser.fds import Fd
from vhostuser.transport import Listener, Transport, adopt, connect, listen


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A short relative path: that of pytest's own directory may be too long for a socket."""
    monkeypatch.chdir(tmp_path)
    yield "disk.sock"
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == [], "temporary files stay behind"


def stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def talk(listener: Listener, path: str) -> None:
    with connect(path) as client, listener.accept() as server:
        client.send(b"ping")
        assert server.receive(4) == (b"ping", [])
        server.send(b"pong")
        assert client.receive(4) == (b"pong", [])


def test_a_connection_through_a_socket_file(path: str) -> None:
    with listen(path) as listener:
        assert listener.path == path
        assert not os.get_inheritable(listener.fileno())
        talk(listener, path)
    assert not os.path.lexists(path)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_file_has_its_mode_whatever_the_umask(path: str, mode: int) -> None:
    previous = os.umask(0o077 if mode != 0o600 else 0)
    try:
        with listen(path, mode):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
    finally:
        os.umask(previous)


def test_the_file_gets_its_group_by_name_or_number(path: str) -> None:
    gid = os.getgid()
    for group in (gid, grp.getgrgid(gid).gr_name, str(gid)):
        with listen(path, group=group):
            assert os.stat(path).st_gid == gid
    with pytest.raises(UsageError, match="no such group"):
        listen(path, group="no-such-group-here")


def test_a_stale_file_is_replaced(path: str) -> None:
    stale(path)
    before = os.lstat(path).st_ino
    with listen(path) as listener:
        assert os.lstat(path).st_ino != before
        talk(listener, path)


def test_a_live_socket_is_refused_and_stays(path: str) -> None:
    with listen(path) as listener:
        with pytest.raises(OperatorError, match="another program listens on it"):
            listen(path)
        listener.accept().close()  # the probe
        talk(listener, path)


def test_a_live_socket_with_a_full_queue_is_refused(path: str) -> None:
    with listen(path, backlog=0), connect(path):
        with pytest.raises(OperatorError, match="another program listens on it"):
            listen(path)
        with pytest.raises(PeerGone, match=r"did not accept a connection within 0\.01 s"):
            connect(path, 0.01)


def test_a_live_socket_of_another_type_is_refused(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(OperatorError, match="another program listens on it"):
            listen(path)
        with pytest.raises(OperatorError, match="not a stream socket"):
            connect(path)


def test_a_file_that_is_no_socket_is_refused_and_stays(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(OperatorError, match="a file that is no socket"):
        listen(path)
    assert Path(path).read_text() == "precious"


def test_closing_leaves_a_file_that_is_not_ours_any_more(path: str) -> None:
    listener = listen(path)
    os.unlink(path)
    with listen(path) as successor:
        listener.close()
        listener.close()
        talk(successor, path)


def test_closing_after_the_file_went_is_no_error(path: str) -> None:
    with listen(path):
        os.unlink(path)
    assert not os.path.lexists(path)


def test_a_directory_that_is_not_there_is_said(path: str) -> None:
    with pytest.raises(OperatorError, match=r"missing/disk.sock: the socket cannot be made: No such file"):
        listen(f"missing/{path}")


def test_connecting_to_nobody_says_so(path: str) -> None:
    with pytest.raises(OperatorError, match="there is no such socket"):
        connect(path)
    stale(path)
    with pytest.raises(OperatorError, match="nobody listens on it"):
        connect(path)


@pytest.mark.parametrize("use", [listen, connect])
def test_a_path_too_long_or_impossible_is_told_with_its_limit(use: object) -> None:
    assert callable(use)
    with pytest.raises(UsageError, match="at most 107 bytes, not 108"):
        use("x" * 108)
    for impossible in ("", "@", "a\0b"):
        with pytest.raises(UsageError, match="cannot be a socket path"):
            use(impossible)


def test_the_longest_path_can_be_listened_on(path: str) -> None:
    directory = "d" * 50
    os.mkdir(directory)
    for longest in (path.ljust(107, "x"), f"{directory}/".ljust(106, "/") + "s"):  # a long name; a long directory
        assert len(longest) == 107
        with listen(longest) as listener:
            talk(listener, longest)
        assert not os.path.lexists(longest)
    assert os.listdir(directory) == []


def test_an_abstract_name_needs_no_file(path: str) -> None:
    name = f"@vhostuser-test-{os.getpid()}"
    with listen(name) as listener:
        talk(listener, name)
        with pytest.raises(OperatorError, match="another program listens on it"):
            listen(name)
    with pytest.raises(OperatorError, match="nobody listens on it"):
        connect(name)
    assert os.listdir() == []


def test_an_inherited_listening_socket_is_a_listener(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        os.set_inheritable(sock.fileno(), True)
        number = sock.detach()
    with adopt(number) as adopted:
        assert isinstance(adopted, Listener)
        assert adopted.fileno() == number
        assert not os.get_inheritable(number)
        talk(adopted, path)
    assert os.path.lexists(path), "who made the file removes it"


def test_a_non_blocking_inherited_listener_is_waited_for(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        sock.setblocking(False)
        adopted = adopt(Fd(sock.detach()))
    assert isinstance(adopted, Listener)
    with adopted:
        talk(adopted, path)


def test_an_inherited_connection_is_a_transport() -> None:
    left, right = socket.socketpair()
    with right:
        owned = Fd(left.detach())
        with adopt(owned) as adopted:
            assert isinstance(adopted, Transport)
            assert owned.closed
            adopted.send(b"x")
            assert right.recv(1) == b"x"


def test_other_descriptors_are_refused_and_stay_open(path: str) -> None:
    for kind, cause in (
        (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), "not a Unix stream socket"),
        (socket.socket(socket.AF_INET, socket.SOCK_STREAM), "not a Unix stream socket"),
        (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), "neither listens nor is connected"),
    ):
        with kind, pytest.raises(UsageError, match=cause):
            adopt(kind.fileno())
        assert kind.fileno() == -1
    with Fd(os.open("/dev/null", os.O_RDONLY)) as null:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(UsageError, match="is not a socket"):
            adopt(null)
        assert not null.closed
        assert len(os.listdir("/proc/self/fd")) == before
        number = null.fileno()
    with pytest.raises(UsageError, match=f"file descriptor {number}: it is not open"):
        adopt(number)
