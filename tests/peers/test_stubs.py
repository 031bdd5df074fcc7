"""Our client against the recorded answers and the quirks of other people's programs; see `tests.peers.stubs`."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from tests.peers.raw import FLUSH, IN, OUT, RawDisk, header
from tests.peers.stubs.backend import Script, StubBackend
from tests.peers.stubs.scripts import (
    CROSVM,
    LIBVHOST_USER,
    NO_CONFIG_LVU,
    NO_CONFIG_RVM,
    PROGRAMS,
    RUST_VMM,
    SHORT_CONFIG,
    SIZE,
    SPDK,
)

import vhostuser
from vhostuser.blk.requests import Discard, Read, Write
from vhostuser.errors import BackendUnfit, PeerGone, RemoteProtocolError
from vhostuser.protocol import FrontendRequest, ProtocolFeature
from vhostuser.virtio.blk import BlkFeature
from vhostuser.virtio.features import RingFeature

Req = FrontendRequest
Stub = Callable[[Script], StubBackend]
scripts = pytest.mark.parametrize("script", PROGRAMS, ids=lambda script: script.name)


@scripts
def test_a_client_reads_and_writes_and_nothing_of_it_is_complained_of(script: Script, stub: Stub) -> None:
    backend = stub(script)
    data = os.urandom(3 << 20)
    with vhostuser.connect(backend.socket_path) as disk:
        assert disk.size == SIZE
        disk.write(1 << 20, data)
        disk.flush()
        assert disk.read(1 << 20, len(data)) == data
        assert disk.read(0, 1 << 20) == bytes(1 << 20)
        if disk.features & BlkFeature.WRITE_ZEROES:
            disk.write_zeroes((1 << 20) + 4096, 65536)
            assert disk.read(1 << 20, 131072) == data[:4096] + bytes(65536) + data[69632:131072]
        if disk.features & BlkFeature.DISCARD:
            disk.discard(0, 1 << 20)
        assert disk.get_id() == backend.disk.serial.decode()
    backend.close()
    assert backend.complaints == []
    assert backend.disk.data[4 << 20 :] == bytes(4 << 20)
    assert bytes(backend.disk.data[(1 << 20) + 131072 : 4 << 20]) == data[131072:]


@scripts
def test_many_requests_at_once_are_each_answered_with_their_own_data(script: Script, stub: Stub) -> None:
    backend = stub(script)
    with vhostuser.connect(backend.socket_path, queue_size=64) as disk:
        blocks = {number: os.urandom(4096) for number in range(400)}
        for future in disk.submit_all(Write(4096 * number, data) for number, data in blocks.items()):
            future.result(60)
        futures = disk.submit_all(Read(4096 * number, 4096) for number in blocks)
        assert [future.result(60) for future in futures] == list(blocks.values())
    backend.close()
    assert backend.complaints == []


@scripts
def test_a_second_connection_finds_what_the_first_one_wrote(script: Script, stub: Stub) -> None:
    backend = stub(script)
    for number in range(3):
        with vhostuser.connect(backend.socket_path) as disk:
            assert disk.read(0, 512) == bytes([number]) * 512
            disk.write(0, bytes([number + 1]) * 512)
    backend.close()
    assert backend.complaints == []


def test_requests_go_to_spdk_in_the_only_framing_that_it_takes(stub: Stub) -> None:
    backend = stub(SPDK)
    with vhostuser.connect(backend.socket_path) as disk:
        disk.write(0, b"\x11" * 262144)
        assert disk.read(0, 262144) == b"\x11" * 262144
        disk.flush()
        disk.discard(0, 4096)
    assert backend.disk.framings == {(16, 1)}


def test_the_stub_of_spdk_refuses_what_spdk_refuses(stub: Stub) -> None:
    with RawDisk(stub(SPDK).socket_path) as disk:
        assert disk.frame([header(OUT) + b"\x11" * 512], [1]).status == "UNSUPP"
        assert disk.frame([header(IN)], [513]).status == "UNSUPP"
        assert disk.request(IN, room=0).status == "UNSUPP"
        assert disk.request(FLUSH, sector=1).status == "IOERR"


def test_spdk_is_driven_without_acknowledgements_and_asked_nothing_that_it_did_not_offer(stub: Stub) -> None:
    backend = stub(SPDK)
    with vhostuser.connect(backend.socket_path) as disk:
        assert disk.protocol_features == ProtocolFeature.CONFIG | ProtocolFeature.LOG_SHMFD
        assert disk.config.seg_max == 126
        assert disk.config.size_max == 131072
        assert disk.num_queues == 1
    assert Req.GET_QUEUE_NUM not in backend.seen
    assert Req.SET_MEM_TABLE in backend.seen
    assert backend.seen[backend.seen.index(Req.SET_MEM_TABLE) + 1] == Req.GET_FEATURES


def test_a_disk_without_indirect_descriptors_is_used_with_direct_ones(stub: Stub) -> None:
    with vhostuser.connect(stub(CROSVM).socket_path, queue_size=16) as disk:
        assert not disk.features & RingFeature.INDIRECT_DESC
        data = os.urandom(1 << 20)
        disk.write(0, [data[: 1 << 19], data[1 << 19 :]])
        assert disk.read(0, 1 << 20) == data


def test_crosvm_s_shared_memory_feature_is_left_alone(stub: Stub) -> None:
    backend = stub(CROSVM)
    with vhostuser.connect(backend.socket_path, queues=2) as disk:
        assert ProtocolFeature.SHMEM not in disk.protocol_features
        assert ProtocolFeature.BACKEND_REQ in disk.protocol_features
        disk.write(0, b"\x31" * 512)
    assert Req.SET_BACKEND_REQ_FD in backend.seen


def test_small_pieces_of_the_configuration_are_read_from_crosvm(stub: Stub) -> None:
    with RawDisk(stub(CROSVM).socket_path) as disk:
        whole = disk.device.read_config(0, 60)
        for offset in range(60):
            for size in (1, 2, 4, 8):
                assert disk.device.read_config(offset, size) == whole[offset:].ljust(8, b"\0")[:size]
        assert disk.device.read_config(0, 256) == whole.ljust(256, b"\0")


def test_the_size_of_a_ring_s_base_is_what_crosvm_takes_after_a_stop(stub: Stub) -> None:
    backend = stub(CROSVM)
    with RawDisk(backend.socket_path) as disk:
        for number in range(5):
            disk.write(number, bytes([number]) * 512)
        disk.restart()
        assert disk.read(4, 512) == b"\x04" * 512
        assert disk.queues[0].base == 5
    backend.close()
    assert backend.complaints == []


def test_version_1_and_bit_30_are_accepted_as_libvhost_user_demands(stub: Stub) -> None:
    backend = stub(LIBVHOST_USER)
    with vhostuser.connect(backend.socket_path) as disk:
        assert disk.features & RingFeature.VERSION_1
        assert not disk.protocol_features & ProtocolFeature.INBAND_NOTIFICATIONS
        assert disk.write_cache is False
        disk.set_write_cache(True)
        assert disk.write_cache is True
        assert backend.config[32] == 1
    assert Req.ADD_MEM_REG in backend.seen
    assert Req.SET_MEM_TABLE not in backend.seen


def test_bit_21_of_an_old_rust_vmm_is_not_taken_for_guest_addresses(stub: Stub) -> None:
    with vhostuser.connect(stub(RUST_VMM).socket_path) as disk:
        assert not disk.protocol_features & ProtocolFeature.GPA_ADDRESSES
        assert disk.read(0, 512) == bytes(512)


@pytest.mark.parametrize("script", [NO_CONFIG_LVU, NO_CONFIG_RVM], ids=lambda script: script.name)
def test_a_back_end_that_does_not_tell_its_configuration_is_called_unfit(script: Script, stub: Stub) -> None:
    with pytest.raises(BackendUnfit, match="configuration"):
        vhostuser.connect(stub(script).socket_path)


def test_an_answer_that_is_shorter_than_what_was_asked_is_named(stub: Stub) -> None:
    script = stub(SHORT_CONFIG)
    with RawDisk(script.socket_path) as disk, pytest.raises(RemoteProtocolError, match=r"GET_CONFIG.*108 bytes.*72"):
        disk.device.read_config(0, 96)


def test_requests_under_way_fail_when_the_stub_hangs_up(stub: Stub) -> None:
    backend = stub(RUST_VMM)
    with vhostuser.connect(backend.socket_path) as disk:
        disk.write(0, b"\x01" * 512)
        backend.close()
        with pytest.raises(PeerGone):
            disk.read(0, 512)
        with pytest.raises(PeerGone):
            disk.submit(Discard(0, 512) if disk.features & BlkFeature.DISCARD else Read(0, 512)).result(30)
