"""`vhostuser probe` against our back-end, the storage daemon, recorded programs, and programs that misbehave."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.guest.backends import Export, StorageDaemon
from tests.peers.stubs.backend import Script, StubBackend
from tests.peers.stubs.scripts import CROSVM, LIBVHOST_USER, NO_CONFIG_RVM, RUST_VMM, SHORT_CONFIG, SPDK

from vhostuser.blk.hosts import HOSTS, verdicts
from vhostuser.blk.probe import Findings, probe
from vhostuser.protocol import F_LOG_ALL, F_PROTOCOL_FEATURES, ProtocolFeature
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig, ZonedModel
from vhostuser.virtio.features import RingFeature

from .conftest import Run, Serving
from .test_failures import assert_one_line

Start = Callable[..., Serving]
MIB = 1 << 20
EVERYBODY = {"QEMU", "libvirt", "Cloud Hypervisor", "Firecracker", "crosvm", "libblkio", "SPDK", "Linux guests"}


def able(found: Findings) -> set[str]:
    return {one.host for one in verdicts(found) if one.able}


def test_probe_tells_what_we_serve(serving: Start, run: Run, tmp_path: Path) -> None:
    place = str(tmp_path / "d.sock")
    serving("serve", "memory:size=64M", "--socket", place, "--queues", "3", "--block-size", "4096", "--read-only")
    done = run("vhostuser", "probe", place, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["config"]["capacity"] == 64 * MIB // 512
    assert told["config"]["blk_size"] == 4096
    assert (told["num_queues"], told["mem_slots"], told["status"]) == (3, 509, 0)
    assert {"RO", "BLK_SIZE", "PROTOCOL_FEATURES", "VERSION_1"} <= set(told["features"]["names"])
    assert {"MQ", "CONFIG", "REPLY_ACK"} <= set(told["protocol_features"]["names"])
    assert {one["name"] for one in told["hosts"] if one["able"]} == EVERYBODY
    said = run("vhostuser", "probe", place).stdout
    for text in ("67108864 bytes, 131072 sectors", "read-only", "4096 bytes", "num-queues may be 3 at most"):
        assert text in said


def test_a_second_front_end_is_told_that_the_back_end_is_busy(serving: Start, run: Run, tmp_path: Path) -> None:
    place = str(tmp_path / "d.sock")
    serving("serve", "null:size=1G", "--socket", place)
    from vhostuser import connect

    with connect(place) as client:
        done = run("vhostuser", "probe", place)
        assert_one_line(done, 1)
        assert f"vhostuser: {place}: it is busy with another front-end" in done.stderr
        assert client.read(0, 512) == bytes(512)
    assert run("vhostuser", "probe", place).returncode == 0


@pytest.mark.skipif(not StorageDaemon.available(), reason="qemu-storage-daemon is not installed")
def test_the_storage_daemon_is_probed_and_found_busy(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "d.img"
    image.write_bytes(bytes(MIB))
    with StorageDaemon(image, tmp_path, Export(queues=2)) as daemon:
        place = str(daemon.socket)
        told = json.loads(run("vhostuser", "probe", place, "--json").stdout)
        assert told["config"]["capacity"] == MIB // 512
        assert told["num_queues"] == 2
        hosts = {one["name"]: one for one in told["hosts"]}
        assert hosts["QEMU"]["able"]
        assert "256 bytes of the configuration" in hosts["SPDK"]["reasons"][0]
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(place)
            done = run("vhostuser", "probe", place, "--timeout", "0.5")
            assert_one_line(done, 1)
            assert "it is busy with another front-end" in done.stderr


@contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(4)
        yield listener


def test_a_program_that_accepts_nobody_is_named(run: Run, tmp_path: Path) -> None:
    place = str(tmp_path / "d.sock")
    with listening(place):
        done = run("vhostuser", "probe", place, "--timeout", "0.2")
    assert_one_line(done, 1)
    assert "nobody accepts connections there" in done.stderr


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "closed the connection"),
        (b"\0" * 12, "version"),
        (bytes.fromhex("02000000 05000000 08000000 0000000000000000"), "SET_FEATURES"),
    ],
)
def test_a_program_that_is_no_back_end_is_named(run: Run, tmp_path: Path, answer: bytes, said: str) -> None:
    place = str(tmp_path / "d.sock")
    with listening(place) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    if peer.recv(12):
                        peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        done = run("vhostuser", "probe", place, "--timeout", "5")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert_one_line(done, 1)
    assert said in done.stderr


def test_no_socket_is_one_line(run: Run, tmp_path: Path) -> None:
    done = run("vhostuser", "probe", str(tmp_path / "none.sock"))
    assert_one_line(done, 1)
    assert "there is no such socket" in done.stderr


@pytest.mark.parametrize(
    ("script", "not_for"),
    [
        (SPDK, {"libblkio"}),
        (CROSVM, {"libblkio"}),
        (LIBVHOST_USER, {"SPDK", "crosvm"}),
        (RUST_VMM, {"SPDK"}),
        (SHORT_CONFIG, {"libblkio", "SPDK"}),
        (NO_CONFIG_RVM, EVERYBODY - {"Linux guests"}),
    ],
    ids=lambda value: value.name if isinstance(value, Script) else "",
)
def test_recorded_programs_fit_whom_the_rules_say(script: Script, not_for: set[str], tmp_path: Path) -> None:
    with StubBackend(script, tmp_path / "d.sock"):
        found = probe(str(tmp_path / "d.sock"))
    assert EVERYBODY - able(found) == not_for, found


GOOD = Findings(
    socket="/run/d.sock",
    features=int(BlkFeature.FLUSH | BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE) | F_PROTOCOL_FEATURES | F_LOG_ALL,
    protocol_features=ProtocolFeature((1 << 24) - 1),
    num_queues=4,
    mem_slots=32,
    status=0,
    config=VirtioBlkConfig(capacity=100, blk_size=512),
    config_bytes=60,
    refusals=(),
    largest_config=True,
    config_by_field=True,
)


@pytest.mark.parametrize(
    ("found", "not_for"),
    [
        (GOOD, set()),
        (replace(GOOD, socket="@d"), {"libvirt", "Cloud Hypervisor", "Firecracker", "crosvm"}),
        (
            replace(GOOD, protocol_features=~ProtocolFeature.CONFIG & GOOD.protocol_features, config=None),
            EVERYBODY - {"Linux guests"},
        ),
        (replace(GOOD, protocol_features=~ProtocolFeature.REPLY_ACK & GOOD.protocol_features), {"libblkio"}),
        (replace(GOOD, config_by_field=False), {"crosvm"}),
        (replace(GOOD, config=VirtioBlkConfig(capacity=100, blk_size=8192)), {"Linux guests"}),
        (replace(GOOD, config=VirtioBlkConfig(capacity=100, blk_size=768)), {"Linux guests"}),
        (
            replace(
                GOOD,
                features=GOOD.features | BlkFeature.ZONED,
                config=VirtioBlkConfig(blk_size=512, model=ZonedModel.HOST_MANAGED),
            ),
            {"QEMU", "libvirt", "Cloud Hypervisor", "Firecracker", "crosvm"},
        ),
        (replace(GOOD, features=GOOD.features | BlkFeature.SECURE_ERASE), {"Linux guests"}),
    ],
)
def test_each_rule_refuses_whom_it_concerns(found: Findings, not_for: set[str]) -> None:
    assert EVERYBODY - able(found) == not_for


@pytest.mark.parametrize(
    ("found", "host", "note"),
    [
        (replace(GOOD, features=GOOD.features | RingFeature.RING_RESET), "QEMU", "RING_RESET"),
        (replace(GOOD, num_queues=None, protocol_features=ProtocolFeature.CONFIG), "QEMU", "num-queues=1"),
        (replace(GOOD, protocol_features=ProtocolFeature.CONFIG), "libvirt", "no news of a new size"),
        (replace(GOOD, features=GOOD.features & ~BlkFeature.FLUSH), "Firecracker", "Writeback"),
        (replace(GOOD, features=GOOD.features & ~F_LOG_ALL), "QEMU", "no live migration"),
    ],
)
def test_what_one_should_know_is_noted(found: Findings, host: str, note: str) -> None:
    (verdict,) = [one for one in verdicts(found) if one.host == host]
    assert verdict.able
    assert any(note in reason for reason in verdict.reasons), verdict


def test_every_rule_is_a_sentence_that_can_be_printed() -> None:
    for host in HOSTS:
        for point in (*host.refuses, *host.notes):
            said = point.says.format(queues=1, block_size=1)
            assert re.fullmatch(r"[^.].*[^.]", said), said
