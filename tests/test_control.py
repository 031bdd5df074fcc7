"""The control socket: JSON-RPC 2.0 to the letter, about a real disk."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostuser.blk import BlockDevice
from vhostuser.control import MAX_CLIENTS, MAX_LINE, ControlClient, ControlServer
from vhostuser.disks import FileDisk
from vhostuser.errors import OperatorError, PeerGone, RemoteProtocolError
from vhostuser.jsonrpc import ControlError, Params
from vhostuser.methods import disk_methods
from vhostuser.transport import listen


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def path(image: Path) -> Iterator[str]:
    """The control socket of a disk of 1 MiB, with one method more that has a bug."""
    where = str(image.with_name("disk.sock.ctl"))
    with FileDisk(image) as disk:
        device = BlockDevice(disk, num_queues=2)

        def buggy(params: Params) -> object:
            raise KeyError("oops")

        methods = disk_methods(device, version="1.2.3") | {"test.bug": buggy, "test.echo": dict}
        with ControlServer(listen(where), methods):
            yield where
        device.close()


def raw(path: str, data: bytes, lines: int = 1) -> list[object]:
    """Send ``data``, and return what the lines that answer it say."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(data)
        with sock.makefile("rb") as answers:
            return [json.loads(answers.readline()) for _ in range(lines)]


def error_code(answer: object) -> int:
    assert isinstance(answer, dict)
    assert answer["jsonrpc"] == "2.0"
    assert "result" not in answer
    code = answer["error"]["code"]
    assert isinstance(code, int)
    return code


def test_the_socket_is_for_its_owner_alone_and_goes_when_the_server_stops(path: str, image: Path) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_info_stats_and_version_are_told(path: str, image: Path) -> None:
    with ControlClient(path) as client:
        info = client.call("disk.info")
        assert isinstance(info, dict)
        assert (info["disk"], info["size"], info["num_queues"]) == (str(image), 1 << 20, 2)
        stats = client.call("disk.stats")
        assert isinstance(stats, dict)
        assert [queue["reads"] for queue in stats["queues"]] == [0, 0]
        assert client.call("server.version") == {"name": "vhostuser", "version": "1.2.3"}


@pytest.mark.parametrize("size", [2 << 20, "2M"])
def test_a_resize_changes_the_file_and_says_what_the_guest_knows(path: str, image: Path, size: object) -> None:
    with ControlClient(path) as client:
        answer = client.call("disk.resize", size=size)
    assert isinstance(answer, dict)
    assert (answer["size"], answer["notice"]) == (2 << 20, "not_connected")
    assert "no guest is connected" in answer["message"]
    assert image.stat().st_size == 2 << 20


def test_a_resize_without_a_size_reads_it_again(path: str, image: Path) -> None:
    with ControlClient(path) as client:
        assert client.call("disk.resize") == {
            "size": 1 << 20,
            "notice": "unchanged",
            "message": "the size is what it was",
        }
        os.truncate(image, 3 << 20)
        answer = client.call("disk.resize")
        assert isinstance(answer, dict)
        assert answer["size"] == 3 << 20


@pytest.mark.parametrize(
    "params", [{"size": -1}, {"size": True}, {"size": 1.5}, {"size": "big"}, {"length": 1}, {"size": 0}]
)
def test_parameters_that_make_no_sense_are_invalid_params(path: str, params: dict[str, object], image: Path) -> None:
    with ControlClient(path) as client, pytest.raises(ControlError) as caught:
        client.call("disk.resize", **params)
    assert caught.value.code == -32602
    assert image.stat().st_size == 1 << 20


def test_an_operators_mistake_carries_its_cause_and_advice(path: str) -> None:
    with ControlClient(path) as client, pytest.raises(ControlError) as caught:
        client.call("disk.resize", size=100)
    assert isinstance(caught.value.data, dict)
    assert set(caught.value.data) == {"subject", "cause", "advice"}


def test_a_bug_in_a_method_is_an_internal_error_and_one_traceback(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with ControlClient(path) as client:
        with pytest.raises(ControlError) as caught:
            client.call("test.bug")
        assert caught.value.code == -32603
        assert "oops" not in str(caught.value)
        assert caplog.text.count("Traceback") == 1
        client.call("disk.info")


ERRORS = {
    b"{": -32700,
    b"\xff\xfe": -32700,
    b"1": -32600,
    b'"disk.info"': -32600,
    b"[]": -32600,
    b"{}": -32600,
    b'{"jsonrpc": "1.0", "method": "disk.info", "id": 1}': -32600,
    b'{"jsonrpc": "2.0", "method": 1, "id": 1}': -32600,
    b'{"jsonrpc": "2.0", "method": "disk.info", "params": 1, "id": 1}': -32600,
    b'{"jsonrpc": "2.0", "method": "disk.info", "id": {}}': -32600,
    b'{"jsonrpc": "2.0", "method": "disk.none", "id": 1}': -32601,
    b'{"jsonrpc": "2.0", "method": "disk.info", "params": [1], "id": 1}': -32602,
    b'{"jsonrpc": "2.0", "method": "disk.info", "params": {"x": 1}, "id": 1}': -32602,
    b"[" + b",".join([b"1"] * 65) + b"]": -32600,
}


@pytest.mark.parametrize("line", ERRORS)
def test_what_is_no_good_request_is_answered_with_its_code(path: str, line: bytes) -> None:
    assert error_code(raw(path, line + b"\n")[0]) == ERRORS[line]


def test_the_id_comes_back_as_it_was(path: str) -> None:
    for key in (1, "one", 1.5, None):
        request = {"jsonrpc": "2.0", "method": "test.echo", "params": {"a": 1}, "id": key}
        assert raw(path, json.dumps(request).encode() + b"\n") == [{"jsonrpc": "2.0", "id": key, "result": {"a": 1}}]


def test_a_notification_is_carried_out_and_not_answered(path: str, image: Path) -> None:
    lines = b'{"jsonrpc": "2.0", "method": "disk.resize", "params": {"size": "2M"}}\n'
    lines += b'{"jsonrpc": "2.0", "method": "nothing"}\n\n  \n'
    lines += b'{"jsonrpc": "2.0", "method": "test.echo", "id": 9}\n'
    assert raw(path, lines) == [{"jsonrpc": "2.0", "id": 9, "result": {}}]
    assert image.stat().st_size == 2 << 20


def test_a_batch_is_answered_by_a_batch_without_its_notifications(path: str) -> None:
    call = {"jsonrpc": "2.0", "method": "test.echo"}
    answers = raw(path, json.dumps([call | {"id": 1}, call, 7, call | {"id": 2}]).encode() + b"\n")[0]
    assert isinstance(answers, list)
    assert [answer["id"] for answer in answers] == [1, None, 2]
    assert error_code(answers[1]) == -32600
    lines = json.dumps([call, call]).encode() + b"\n" + json.dumps(call | {"id": 3}).encode() + b"\n"
    assert raw(path, lines) == [{"jsonrpc": "2.0", "id": 3, "result": {}}]


def test_requests_may_come_in_pieces_and_many_at_once(path: str) -> None:
    line = b'{"jsonrpc": "2.0", "method": "test.echo", "id": 1}\n'
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(path)
        for byte in line:
            sock.send(bytes([byte]))
        sock.sendall(line * 100)
        with sock.makefile("rb") as answers:
            assert len({answers.readline() for _ in range(101)}) == 1


def test_a_line_that_is_too_long_is_said_to_be_and_ends_the_connection(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(b" " * MAX_LINE)
        with sock.makefile("rb") as answers:
            assert error_code(json.loads(answers.readline())) == -32600
            assert answers.readline() == b""


def test_several_clients_are_served_and_one_too_many_is_refused(path: str) -> None:
    clients = [ControlClient(path) for _ in range(MAX_CLIENTS)]
    for client in clients:
        client.call("server.version")
    with ControlClient(path) as more, pytest.raises((PeerGone, OperatorError)):
        more.call("server.version")
    clients.pop().close()
    for client in clients:
        client.call("server.version")
        client.close()


def test_stopping_disconnects_clients_and_removes_the_socket(tmp_path: Path) -> None:
    where = str(tmp_path / "ctl")
    server = ControlServer(listen(where), {})
    server.start()
    with ControlClient(where) as client:
        with pytest.raises(ControlError, match="no method"):
            client.call("x")
        server.stop()
        with pytest.raises(PeerGone):
            client.call("x")
    assert not os.path.exists(where)


def test_a_client_tells_silence_nonsense_and_absence_apart(tmp_path: Path) -> None:
    where = str(tmp_path / "ctl")
    with pytest.raises(OperatorError, match="no such socket"):
        ControlClient(where)
    with listen(where) as listener:
        with ControlClient(where, timeout_s=0.05) as client, listener.accept(), pytest.raises(PeerGone, match="answer"):
            client.call("x")
        with ControlClient(where) as client, listener.accept() as other:
            other.send(b"hello\n")
            with pytest.raises(RemoteProtocolError):
                client.call("x")
