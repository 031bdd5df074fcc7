"""What each message does to the queues, and how it is answered: against queues that take notes."""

from __future__ import annotations

import logging
import os
import sys

import pytest
from tests.backend.conftest import Serve
from tests.backend.fakes import NUM_QUEUES, FakeDevice, addr_of
from tests.backend.frontend import ACKED, Frontend, GoneError, GuestRam

from vhostuser.backend import hints
from vhostuser.protocol import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    Config,
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    Raw,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)

Req = FrontendRequest
F = FakeDevice.FEATURES


@pytest.fixture
def ram() -> GuestRam:
    return GuestRam(1 << 20)


def describe_ring(peer: Frontend, index: int = 0) -> None:
    """NUM and ADDR: all of a ring but its kick."""
    peer.do(Req.SET_VRING_NUM, VringState(index, 64))
    peer.do(Req.SET_VRING_ADDR, addr_of(index))


def kick(peer: Frontend, index: int = 0) -> None:
    """SET_VRING_KICK without a descriptor."""
    peer.do(Req.SET_VRING_KICK, VringFd.of(index, no_fd=True))


def starts(device: FakeDevice) -> list[tuple[object, ...]]:
    return [call for call in device.fake.calls if call[0] == "start"]


@pytest.mark.covers(
    "VHOST_USER_GET_FEATURES",
    "VHOST_USER_GET_PROTOCOL_FEATURES",
    "VHOST_USER_SET_PROTOCOL_FEATURES",
    "VHOST_USER_SET_FEATURES",
    "VHOST_USER_SET_OWNER",
)
def test_features_are_offered_and_the_choice_reaches_the_device(device: FakeDevice, peer: Frontend) -> None:
    assert peer.number(Req.GET_FEATURES) == F | F_PROTOCOL_FEATURES | F_LOG_ALL
    assert peer.number(Req.GET_PROTOCOL_FEATURES) == device.protocol_features
    assert peer.negotiate(1 << 32) == 1 << 32
    assert device.told == [("features", 1 << 32)]


def test_features_may_be_chosen_before_protocol_features(device: FakeDevice, peer: Frontend) -> None:
    peer.send(Req.SET_OWNER)
    offered = peer.number(Req.GET_FEATURES)
    peer.send(Req.SET_FEATURES, U64(offered))
    peer.send(Req.SET_PROTOCOL_FEATURES, U64(peer.number(Req.GET_PROTOCOL_FEATURES)))
    peer.do(Req.SET_OWNER)
    assert device.told == [("features", F)]


@pytest.mark.covers("VHOST_USER_PROTOCOL_F_REPLY_ACK")
def test_an_ack_can_be_asked_for_on_the_very_message_that_negotiates_it(peer: Frontend) -> None:
    peer.number(Req.GET_FEATURES)
    peer.do(Req.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))


def test_protocol_features_need_not_be_asked_for_again_after_a_reconnect(peer: Frontend) -> None:
    peer.send(Req.SET_OWNER)
    peer.number(Req.GET_FEATURES)
    peer.do(Req.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG))
    assert peer.config(4) == bytes(range(4))


def test_a_front_end_that_does_not_ask_is_held_to_what_is_offered_too(peer: Frontend) -> None:
    """Postcopy, which nobody offered, would change how messages are answered."""
    chosen = U64(ProtocolFeature.REPLY_ACK | ProtocolFeature.PAGEFAULT).pack()
    header = b"".join(word.to_bytes(4, sys.byteorder) for word in (Req.SET_PROTOCOL_FEATURES, 1, len(chosen)))
    peer.socket.sendall(header + chosen)
    assert peer.closed_by_peer()


@pytest.mark.parametrize("feature", [1 << 5, 1 << 27, 1 << 34])
def test_a_feature_that_was_not_offered_is_refused(device: FakeDevice, peer: Frontend, feature: int) -> None:
    peer.negotiate(0)
    assert peer.tell_bluntly(Req.SET_FEATURES, U64(F_PROTOCOL_FEATURES | feature)) != ACKED
    assert device.told == [("features", 0)]


@pytest.mark.covers("VHOST_USER_RESET_OWNER")
def test_reset_owner_is_acknowledged_and_changes_nothing(device: FakeDevice, peer: Frontend, ram: GuestRam) -> None:
    peer.negotiate()
    ram.share(peer)
    peer.do(Req.RESET_OWNER)
    describe_ring(peer)
    kick(peer)
    assert starts(device) == [("start", 0, 64, 0, F, False, "---")]


def test_set_owner_may_be_repeated(peer: Frontend) -> None:
    peer.negotiate()
    peer.do(Req.SET_OWNER)
    peer.do(Req.SET_OWNER)


@pytest.mark.covers("VHOST_USER_GET_QUEUE_NUM", "VHOST_USER_PROTOCOL_F_MQ")
def test_the_number_of_queues_is_told(peer: Frontend) -> None:
    peer.negotiate()
    assert peer.number(Req.GET_QUEUE_NUM) == NUM_QUEUES


@pytest.mark.covers(
    "VHOST_USER_SET_MEM_TABLE",
    "VHOST_USER_SET_VRING_NUM",
    "VHOST_USER_SET_VRING_ADDR",
    "VHOST_USER_SET_VRING_BASE",
    "VHOST_USER_SET_VRING_KICK",
    "VHOST_USER_SET_VRING_ENABLE",
)
def test_a_ring_set_up_as_qemu_does_it_starts_at_its_kick(device: FakeDevice, peer: Frontend, ram: GuestRam) -> None:
    peer.negotiate()
    fd = os.eventfd(0)
    peer.do(Req.SET_VRING_CALL, VringFd.of(0), [fd])
    ram.share(peer)
    describe_ring(peer)
    peer.do(Req.SET_VRING_BASE, VringState(0, 17))
    assert not starts(device)
    peer.do(Req.SET_VRING_KICK, VringFd.of(0), [fd])
    os.close(fd)
    assert starts(device) == [("start", 0, 64, 17, F, False, "kc-")]
    for index in range(NUM_QUEUES):
        peer.do(Req.SET_VRING_ENABLE, VringState(index, 1))
    assert [call for call in device.fake.calls if call[0] == "enable"] == [("enable", 0, True)]


def test_a_ring_enabled_before_anything_else_starts_enabled(device: FakeDevice, peer: Frontend, ram: GuestRam) -> None:
    peer.negotiate()
    peer.do(Req.SET_VRING_ENABLE, VringState(1, 1))
    ram.share(peer)
    describe_ring(peer, 1)
    kick(peer, 1)
    assert starts(device) == [("start", 1, 64, 0, F, True, "---")]


@pytest.mark.parametrize("last", ["num", "addr", "memory", "region"])
def test_a_ring_that_was_kicked_early_starts_when_the_missing_piece_comes(
    device: FakeDevice, peer: Frontend, ram: GuestRam, last: str
) -> None:
    first = {"num": ("addr", "memory"), "addr": ("num", "memory")}.get(last, ("num", "addr"))
    pieces = {
        "num": lambda: peer.do(Req.SET_VRING_NUM, VringState(0, 64)),
        "addr": lambda: peer.do(Req.SET_VRING_ADDR, addr_of(0)),
        "memory": lambda: ram.share(peer),
        "region": lambda: ram.add(peer),
    }
    peer.negotiate()
    kick(peer)
    for name in first:
        pieces[name]()
    assert not starts(device)
    pieces[last]()
    assert starts(device) == [("start", 0, 64, 0, F, False, "---")]


def test_without_the_protocol_features_bit_rings_start_enabled(
    device: FakeDevice, peer: Frontend, ram: GuestRam
) -> None:
    peer.send(Req.SET_OWNER)
    peer.number(Req.GET_FEATURES)
    peer.send(Req.SET_FEATURES, U64(F))
    peer.send(Req.SET_MEM_TABLE, MemoryTable((ram.region(),)), [ram.arena.fd])
    peer.send(Req.SET_VRING_NUM, VringState(0, 64))
    peer.send(Req.SET_VRING_ADDR, addr_of(0))
    peer.send(Req.SET_VRING_KICK, VringFd.of(0, no_fd=True))
    peer.barrier()
    assert starts(device) == [("start", 0, 64, 0, F, True, "---")]


def test_a_running_ring_is_enabled_when_the_protocol_features_bit_goes(
    device: FakeDevice, peer: Frontend, ram: GuestRam
) -> None:
    peer.negotiate()
    ram.share(peer)
    describe_ring(peer)
    kick(peer)
    peer.do(Req.SET_FEATURES, U64(F))
    assert device.fake.calls[-1] == ("enable", 0, True)


def test_enable_governs_a_front_end_that_left_out_set_features(
    device: FakeDevice, peer: Frontend, ram: GuestRam
) -> None:
    peer.number(Req.GET_FEATURES)
    peer.send(Req.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))
    ram.share(peer)
    assert (
        peer.tell_bluntly(Req.SET_VRING_ENABLE, VringState(0, 0)) == ACKED
    )  # crosvm knows the bit from an earlier life
    describe_ring(peer)
    kick(peer)
    assert starts(device) == [("start", 0, 64, 0, 0, False, "---")]


@pytest.mark.covers("VHOST_USER_GET_VRING_BASE")
def test_get_vring_base_stops_a_ring_and_another_kick_starts_it_there(
    device: FakeDevice, peer: Frontend, ram: GuestRam
) -> None:
    peer.negotiate()
    ram.share(peer)
    describe_ring(peer)
    peer.do(Req.SET_VRING_ENABLE, VringState(0, 1))
    kick(peer)
    assert peer.ask(Req.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 7)
    kick(peer)
    assert starts(device)[-1] == ("start", 0, 64, 7, F, True, "---")


def test_get_vring_base_of_a_ring_that_does_not_run_answers_its_base(peer: Frontend) -> None:
    peer.negotiate()
    assert peer.ask(Req.GET_VRING_BASE, VringState(2, 0)) == VringState(2, 0)
    peer.do(Req.SET_VRING_BASE, VringState(2, 11))
    assert peer.ask(Req.GET_VRING_BASE, VringState(2, 0)) == VringState(2, 11)


@pytest.mark.covers("VHOST_USER_SET_VRING_CALL", "VHOST_USER_SET_VRING_ERR")
def test_call_and_err_change_while_the_ring_runs_and_may_be_taken_away(
    device: FakeDevice, peer: Frontend, ram: GuestRam
) -> None:
    peer.negotiate()
    ram.share(peer)
    describe_ring(peer)
    kick(peer)
    fd = os.eventfd(0)
    for request in (Req.SET_VRING_CALL, Req.SET_VRING_ERR, Req.SET_VRING_KICK):
        peer.do(request, VringFd.of(0), [fd])
        peer.do(request, VringFd.of(0, no_fd=True))
    os.close(fd)
    assert device.fake.calls[-6:] == [
        (name, 0, given) for name in ("set_call", "set_err", "set_kick") for given in (True, False)
    ]


def test_addresses_may_be_repeated_on_a_running_ring_but_not_moved(
    device: FakeDevice, peer: Frontend, ram: GuestRam
) -> None:
    peer.negotiate()
    ram.share(peer)
    describe_ring(peer)
    kick(peer)
    same = addr_of(0)
    peer.do(Req.SET_VRING_ADDR, VringAddr(0, 1, same.descriptor, same.used, same.available, 0x5000))
    assert peer.tell(Req.SET_VRING_ADDR, addr_of(0, 0x8000)) != 0
    assert peer.tell(Req.SET_VRING_NUM, VringState(0, 32)) != 0
    assert peer.tell(Req.SET_VRING_BASE, VringState(0, 32)) != 0
    assert len(starts(device)) == 1


@pytest.mark.covers(
    "VHOST_USER_ADD_MEM_REG",
    "VHOST_USER_REM_MEM_REG",
    "VHOST_USER_GET_MAX_MEM_SLOTS",
    "VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS",
)
def test_regions_come_and_go_while_rings_run(device: FakeDevice, peer: Frontend, ram: GuestRam) -> None:
    peer.negotiate()
    assert peer.number(Req.GET_MAX_MEM_SLOTS) == 509
    ram.add(peer)
    describe_ring(peer)
    kick(peer)
    more = MemoryRegion(1 << 32, 1 << 20, 1 << 40, 0)
    peer.do(Req.ADD_MEM_REG, SingleRegion(more), [ram.arena.fd])
    assert device.fake.calls[-1] == ("set_memory", 2)
    assert peer.tell(Req.ADD_MEM_REG, SingleRegion(more), [ram.arena.fd]) != 0, "it is there already"
    peer.do(Req.REM_MEM_REG, SingleRegion(MemoryRegion(1 << 32, 1 << 20, 1 << 40, 77)))
    assert device.fake.calls[-1] == ("set_memory", 1)
    assert peer.tell(Req.REM_MEM_REG, SingleRegion(more)) != 0, "it is gone already"
    ram.share(peer)
    assert len(starts(device)) == 1


def test_the_509th_region_is_taken_and_the_510th_refused(device: FakeDevice, peer: Frontend, ram: GuestRam) -> None:
    peer.negotiate()
    for number in range(509):
        region = MemoryRegion(number << 20, 4096, (1 << 40) + (number << 20), 0)
        peer.do(Req.ADD_MEM_REG, SingleRegion(region), [ram.arena.fd])
    assert device.fake.calls[-1] == ("set_memory", 509)
    last = MemoryRegion(1 << 36, 4096, 1 << 44, 0)
    assert peer.tell(Req.ADD_MEM_REG, SingleRegion(last), [ram.arena.fd]) != 0


@pytest.mark.covers(
    "VHOST_USER_RESET_DEVICE",
    "VHOST_USER_SET_STATUS",
    "VHOST_USER_GET_STATUS",
    "VHOST_USER_PROTOCOL_F_RESET_DEVICE",
    "VHOST_USER_PROTOCOL_F_STATUS",
)
@pytest.mark.parametrize("by_status", [False, True])
def test_a_reset_stops_and_disables_rings_and_keeps_the_memory(
    device: FakeDevice, peer: Frontend, ram: GuestRam, by_status: bool
) -> None:
    peer.negotiate()
    ram.share(peer)
    describe_ring(peer)
    kick(peer)
    peer.do(Req.SET_VRING_ENABLE, VringState(0, 1))
    peer.do(Req.SET_STATUS, U64(0xF))
    assert peer.number(Req.GET_STATUS) == 0xF
    peer.do(Req.SET_STATUS, U64(0)) if by_status else peer.do(Req.RESET_DEVICE)
    assert device.told[-2:] == [("status", 0xF), ("reset",)]
    assert peer.number(Req.GET_STATUS) == 0
    assert device.fake.calls[-2:] == [("enable", 0, False), ("stop", 0)]
    peer.do(Req.SET_FEATURES, U64(F | F_PROTOCOL_FEATURES))
    describe_ring(peer)
    kick(peer)
    assert starts(device)[-1] == ("start", 0, 64, 0, F, False, "---")


@pytest.mark.covers("VHOST_USER_GET_CONFIG", "VHOST_USER_SET_CONFIG", "VHOST_USER_PROTOCOL_F_CONFIG")
def test_the_configuration_is_read_at_any_place_and_padded_with_zeroes(device: FakeDevice, peer: Frontend) -> None:
    peer.negotiate()
    for offset, size in ((0, 16), (0, 1), (3, 2), (0, 36), (0, 256), (15, 60), (16, 8), (4000, 84)):
        assert peer.config(size, offset) == bytes(device.config[offset : offset + size]).ljust(size, b"\0")
    assert peer.config(4, flags=1) == peer.config(4, flags=2) == bytes(range(4))
    for flags in (0, 1):
        peer.do(Req.SET_CONFIG, Config(15, 1, flags, bytes([flags + 1])))
        assert device.config[15] == flags + 1
    assert peer.tell(Req.SET_CONFIG, Config(0, 4, 0, bytes(4))) != 0
    assert peer.config(16) == bytes(range(15)) + b"\2"


def test_a_device_without_a_configuration_space_does_not_offer_one(
    device: FakeDevice, peer: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDevice, "has_config", False)
    peer.negotiate()
    assert ProtocolFeature.CONFIG not in peer.connection.protocol_features
    assert peer.tell_bluntly(Req.GET_CONFIG, Config(0, 4, 0, bytes(4))) == bytes(12), "the form of a failure"
    peer.barrier()


NONSENSE = {
    "a ring that does not exist, NUM": (Req.SET_VRING_NUM, VringState(NUM_QUEUES, 64)),
    "a ring that does not exist, BASE": (Req.SET_VRING_BASE, VringState(200, 0)),
    "a ring that does not exist, ADDR": (Req.SET_VRING_ADDR, addr_of(1 << 31)),
    "a ring that does not exist, KICK": (Req.SET_VRING_KICK, VringFd.of(255, no_fd=True)),
    "a ring that does not exist, CALL": (Req.SET_VRING_CALL, VringFd.of(NUM_QUEUES, no_fd=True)),
    "a ring that does not exist, ERR": (Req.SET_VRING_ERR, VringFd.of(NUM_QUEUES, no_fd=True)),
    "a ring that does not exist, ENABLE": (Req.SET_VRING_ENABLE, VringState(NUM_QUEUES, 1)),
    "a size that is no power of two": (Req.SET_VRING_NUM, VringState(0, 65)),
    "a size beyond the device's": (Req.SET_VRING_NUM, VringState(0, 2048)),
    "a base of a packed ring": (Req.SET_VRING_BASE, VringState(0, 0x8000_8000)),
    "a region that is not there": (Req.REM_MEM_REG, SingleRegion(MemoryRegion(0, 4096, 0, 0))),
    "a request that is in no specification": (4711, Raw(b"what?")),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_nacked_when_an_ack_was_asked_for_and_the_connection_goes_on(
    device: FakeDevice, peer: Frontend, name: str
) -> None:
    peer.negotiate()
    assert peer.tell(*NONSENSE[name]) != 0
    assert peer.number(Req.GET_QUEUE_NUM) == NUM_QUEUES
    assert not starts(device)


@pytest.mark.parametrize("name", [name for name in NONSENSE if "specification" not in name])
def test_nonsense_without_an_ack_ends_the_connection_with_one_line(
    peer: Frontend, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    peer.negotiate()
    peer.send(*NONSENSE[name])
    assert peer.closed_by_peer()
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert NONSENSE[name][0].name in lines[0].getMessage()  # type: ignore[attr-defined]


def test_an_unknown_request_without_an_ack_is_ignored_and_logged(
    peer: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    peer.negotiate()
    peer.send(4711, Raw(b"what?"))
    assert peer.number(Req.GET_QUEUE_NUM) == NUM_QUEUES
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "fake: message 4711 is not known and was ignored"
    ]


def test_get_vring_base_of_a_ring_that_does_not_exist_can_only_end_the_connection(peer: Frontend) -> None:
    peer.negotiate()
    peer.send(Req.GET_VRING_BASE, VringState(NUM_QUEUES, 0))
    assert peer.closed_by_peer()


def test_a_ring_that_cannot_start_refuses_its_kick_and_may_be_kicked_again(
    device: FakeDevice, peer: Frontend, ram: GuestRam
) -> None:
    peer.negotiate()
    ram.share(peer)
    describe_ring(peer)
    device.fake.refuse_start = "it lies outside of memory"
    assert peer.tell(Req.SET_VRING_KICK, VringFd.of(0, no_fd=True)) != 0
    device.fake.refuse_start = None
    assert not starts(device)
    kick(peer)
    assert len(starts(device)) == 1


def test_a_broken_ring_is_one_log_line_and_the_connection_goes_on(
    device: FakeDevice, peer: Frontend, ram: GuestRam, caplog: pytest.LogCaptureFixture
) -> None:
    peer.negotiate()
    ram.share(peer)
    describe_ring(peer)
    kick(peer)
    device.fake.post("ring_broken", 0, "the chain loops")
    assert peer.ask(Req.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 7)
    peer.barrier()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [
        "fake: ring 0 is broken: the chain loops"
    ]


def test_lost_memory_ends_the_connection(device: FakeDevice, peer: Frontend, caplog: pytest.LogCaptureFixture) -> None:
    peer.negotiate()
    device.fake.post("memory_lost", None, "its file was truncated")
    assert peer.closed_by_peer()
    assert "guest memory was lost: its file was truncated" in caplog.text


def test_a_worker_that_ended_ends_the_connection(
    device: FakeDevice, peer: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    peer.negotiate()
    device.fake.post("worker_failed", None, "no memory")
    assert peer.closed_by_peer()
    assert "a queue worker has ended: no memory" in caplog.text


def test_storage_that_does_not_answer_in_time_refuses_a_new_memory_table(
    device: FakeDevice, peer: Frontend, ram: GuestRam
) -> None:
    peer.negotiate()
    ram.share(peer)
    device.fake.stuck = True
    assert peer.tell(Req.SET_MEM_TABLE, MemoryTable((ram.region(),)), [ram.arena.fd]) != 0
    device.fake.stuck = False
    ram.share(peer)


def test_the_end_of_a_connection_rests_and_stops_every_ring_and_lets_go_of_the_memory(
    device: FakeDevice, serve: Serve, ram: GuestRam
) -> None:
    peer = serve(device)
    peer.negotiate()
    ram.share(peer)
    for index in (0, 2):
        describe_ring(peer, index)
        kick(peer, index)
    peer.send(Req.SET_VRING_NUM, VringState(99, 64))
    assert peer.closed_by_peer()
    while device.told[-1] != ("reset",):
        os.sched_yield()
    assert device.fake.calls[-5:] == [
        ("enable", 0, False), ("enable", 2, False), ("stop", 0), ("stop", 2), ("set_memory", 0),
    ]  # fmt: skip


def test_memory_without_descriptors_brings_the_hint_about_sharing(
    peer: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    peer.negotiate()
    assert peer.tell_bluntly(Req.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 4096, 4096, 0),))) != ACKED
    assert "share=on" in caplog.text


def test_a_ring_without_any_memory_brings_the_hint_about_sharing(
    peer: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    peer.negotiate()
    peer.do(Req.SET_MEM_TABLE, MemoryTable(()))
    describe_ring(peer)
    kick(peer)
    assert "share=on" not in caplog.text
    peer.do(Req.SET_VRING_ENABLE, VringState(0, 1))
    peer.barrier()
    assert "share=on" in caplog.text


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look after a hundredth of the time whether a guest gets anywhere."""
    monkeypatch.setattr(hints, "FIRST_LOOK_S", 0.01)
    monkeypatch.setattr(hints, "LAST_LOOK_S", 0.6)


@pytest.fixture
def running(device: FakeDevice, peer: Frontend, ram: GuestRam) -> FakeDevice:
    """A device with a ring that runs, in memory of zeroes."""
    peer.negotiate()
    ram.share(peer)
    describe_ring(peer)
    kick(peer)
    peer.do(Req.SET_VRING_ENABLE, VringState(0, 1))
    return device


def looked(device: FakeDevice, times: int) -> None:
    """Wait until the session has read the counters so often."""
    seen = device.fake.looks
    while device.fake.looks < seen + times:
        os.sched_yield()


@pytest.mark.usefixtures("quick_looks")
def test_a_guest_whose_writes_never_appear_brings_the_hint_about_sharing_once(
    running: FakeDevice, peer: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    looked(running, 1)
    assert "share=on" not in caplog.text
    running.fake.counters = {"kicks": 1}
    looked(running, 1)
    peer.barrier()
    peer.do(Req.SET_VRING_ENABLE, VringState(0, 1))
    assert caplog.text.count("share=on") == 1


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("sign", ["writes", "memory"])
def test_a_guest_that_shares_its_memory_brings_no_hint(
    running: FakeDevice, peer: Frontend, ram: GuestRam, caplog: pytest.LogCaptureFixture, sign: str
) -> None:
    memoryview(ram.arena)[0:4] = b"BIOS" if sign == "memory" else bytes(4)
    running.fake.counters = {"kicks": 5, "writes": int(sign == "writes")}
    looked(running, 1)
    peer.barrier()
    assert "share=on" not in caplog.text


DECODED = [
    Req.SEND_RARP,
    Req.NET_SET_MTU,
    Req.IOTLB_MSG,
    Req.SET_VRING_ENDIAN,
    Req.CREATE_CRYPTO_SESSION,
    Req.CLOSE_CRYPTO_SESSION,
    Req.POSTCOPY_ADVISE,
    Req.POSTCOPY_LISTEN,
    Req.POSTCOPY_END,
    Req.GPU_SET_SOCKET,
    Req.VRING_KICK,
    Req.GET_SHARED_OBJECT,
    Req.GET_SHMEM_CONFIG,
    Req.GET_VRING_BASE_SKIP_DRAIN,
]


@pytest.mark.parametrize(
    "request_", [pytest.param(req, marks=pytest.mark.covers(f"VHOST_USER_{req.name}"), id=req.name) for req in DECODED]
)
def test_a_request_that_is_not_supported_is_refused(device: FakeDevice, peer: Frontend, request_: Req) -> None:
    peer.negotiate()
    before = list(device.fake.calls)
    try:
        refused = peer.tell_bluntly(request_, Raw(bytes(8))) != ACKED
    except GoneError:
        refused = True
    assert refused
    assert [call for call in device.fake.calls if call not in before] in ([], [("set_memory", 0)])
