"""Disks that lie, break or fall silent: each call ends in a result or in one clear error, and other disks go on."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest
from tests.blk_client.conftest import WAIT_S
from tests.frontend import fakes
from tests.frontend.fakes import FakeBackend, Hangup, Received, Ring, answer, config, message, serve_disk

import vhostuser
from vhostuser import (
    BackendUnfit,
    Backoff,
    PeerGone,
    Read,
    RemoteProtocolError,
    RemoteRingError,
    RequestFailed,
    Transport,
    Write,
)

Device = Callable[[FakeBackend, Ring], None]


def using(ident: int | None, written: int = 1, *, times: int = 1, steps: int = 1) -> Device:
    """A device that answers its first request with this used entry; ``ident`` None is the right one."""

    def device(backend: FakeBackend, ring: Ring) -> None:
        if (head := backend.take(ring)) is None:
            return
        backend.at(backend.chain(ring, head)[-1][0], 1)[0] = 0
        for _ in range(times):
            backend.put(ring, head if ident is None else ident, written, steps=steps)
        backend.call(ring)

    return device


@pytest.mark.parametrize(
    ("device", "evidence"),
    [
        (using(5), "used id 5 is not outstanding"),
        (using(0xFFFF_FFFF), "used id 4294967295 is not outstanding"),
        (using(None, times=2), "is not outstanding"),
        (using(None, 2), "chain 0 was used with 2 bytes written but has room for 1"),
        (using(None, 0xFFFF_FFFF), "was used with 4294967295 bytes written"),
        # The device may take more than one step before anybody looks.
        (using(None, steps=77), r"used.idx jumped from 0 to \d+ with \d+ chains outstanding"),
        (using(None, steps=-1), r"used.idx jumped from 0 to 65\d\d\d with \d+ chains outstanding"),
    ],
)
def test_a_ring_that_lies_fails_every_call_with_evidence(device: Device, evidence: str) -> None:
    with FakeBackend(device=device) as backend, vhostuser.connect(backend.give()) as client:
        futures = client.submit_all([Write(0, bytes(512))] * 200)
        assert not wait(futures, WAIT_S).not_done
        errors = [future.exception() for future in futures]
        assert all(isinstance(error, RemoteRingError) for error in errors)
        assert len(set(map(id, errors))) == len(errors), "one error for each call"
        with pytest.raises(RemoteRingError, match=evidence):
            client.read(0, 512)


def test_an_entry_that_comes_twice_later_is_found_out() -> None:
    def device(backend: FakeBackend, ring: Ring) -> None:
        while (head := backend.take(ring)) is not None:
            answer(backend, ring, head)
            if ring.base == 3:
                backend.put(ring, head, 1)
        backend.call(ring)

    with FakeBackend(device=device) as backend, vhostuser.connect(backend.give()) as client:
        for _ in range(2):
            client.read(0, 512)
        futures = client.submit_all([Read(0, 512)])
        assert not wait(futures, WAIT_S).not_done
        with pytest.raises(RemoteRingError, match=r"used\.idx jumped from \d to 4|is not outstanding"):
            client.read(0, 512)


@pytest.mark.parametrize(
    ("status", "errno", "text"),
    [
        (1, 5, "IN at sector 3 failed with status IOERR"),
        (2, 95, "IN at sector 3 failed with status UNSUPP"),
        (77, 5, "failed with status 0x4d, which is unknown"),
        (255, 5, "gave IN at sector 3 back without a status"),
    ],
)
def test_a_status_is_told_as_it_came_and_the_disk_goes_on(status: int, errno: int, text: str) -> None:
    def device(backend: FakeBackend, ring: Ring) -> None:
        while (head := backend.take(ring)) is not None:
            answer(backend, ring, head, status if ring.base == 1 else 0)
        backend.call(ring)

    with FakeBackend(device=device) as backend, vhostuser.connect(backend.give()) as client:
        with pytest.raises(RequestFailed, match=text) as caught:
            client.read(3 * 512, 512)
        assert (caught.value.status, caught.value.errno) == (status, errno)
        assert client.read(0, 512) == bytes(512)


def test_when_a_part_fails_the_rest_is_spared_and_the_first_error_told() -> None:
    def device(backend: FakeBackend, ring: Ring) -> None:
        while (head := backend.take(ring)) is not None:
            answer(backend, ring, head, 1 if ring.base == 2 else 0)
        backend.call(ring)

    space = config(1 << 20)
    with FakeBackend(device=device, space=space) as backend:
        backend.disk = bytearray(64 << 20)
        with vhostuser.connect(backend.give(), queue_size=4) as client:
            with pytest.raises(RequestFailed, match="OUT at sector 2048 failed"):
                client.write(0, bytes(64 << 20))
            assert len(backend.chains) < 64


def test_silence_ends_in_time_with_all_that_waited() -> None:
    with (
        FakeBackend(device=lambda backend, ring: None) as backend,
        vhostuser.connect(backend.give(), request_timeout_s=0.1) as client,
    ):
        futures = client.submit_all([Read(0, 512)] * 200)
        assert not wait(futures, WAIT_S).not_done
        for future in futures:
            with pytest.raises(PeerGone, match=r"left a request unanswered for 0\.1 s"):
                future.result()


def test_an_answer_without_a_call_is_found_when_time_is_up() -> None:
    def device(backend: FakeBackend, ring: Ring) -> None:
        while (head := backend.take(ring)) is not None:
            answer(backend, ring, head)

    with (
        FakeBackend(device=device) as backend,
        vhostuser.connect(backend.give(), request_timeout_s=0.1) as client,
    ):
        assert client.read(0, 512) == bytes(512)
        assert client.connected


def test_a_ring_reported_as_broken_ends_the_connection() -> None:
    def device(backend: FakeBackend, ring: Ring) -> None:
        if backend.take(ring) is not None:
            os.eventfd_write(ring.err, 1)

    with (
        FakeBackend(device=device) as backend,
        vhostuser.connect(backend.give()) as client,
        pytest.raises(RemoteRingError, match="reports that ring 0 is broken"),
    ):
        client.read(0, 512)


def test_answers_that_came_before_the_hang_up_count() -> None:
    def device(backend: FakeBackend, ring: Ring) -> None:
        while ring.base < 3 and (head := backend.take(ring)) is not None:
            answer(backend, ring, head)
        if ring.base == 3:  # however many kicks it took, and however many come before the hang-up
            backend.hang_up()

    with FakeBackend(device=device) as backend, vhostuser.connect(backend.give()) as client:
        futures = client.submit_all([Read(0, 512)] * 5)
        assert not wait(futures, WAIT_S).not_done
        assert [future.result() for future in futures[:3]] == [bytes(512)] * 3
        for future in futures[3:]:
            with pytest.raises(PeerGone, match="closed the connection"):
                future.result()
        assert not client.connected


@pytest.mark.parametrize("seed", range(50))
def test_a_back_end_that_goes_at_any_point_leaves_no_call_hanging(seed: int) -> None:
    draw = random.Random(seed)
    die_at = draw.randrange(1, 120)

    def device(backend: FakeBackend, ring: Ring) -> None:
        while (head := backend.take(ring)) is not None:
            if ring.base >= die_at:
                backend.hang_up()
                return
            answer(backend, ring, head)
            if draw.random() < 0.7:
                backend.call(ring)
        backend.call(ring)

    with FakeBackend(device=device) as backend, vhostuser.connect(backend.give(), queue_size=16) as client:
        futures = []
        try:
            for _ in range(40):
                futures += client.submit_all([Read(0, 512), Write(512, bytes(1024)), Read(1024, 4096)])
        except PeerGone:
            assert not client.connected
        done, left = wait(futures, WAIT_S)
        assert not left
        assert all(future.exception() is None or isinstance(future.exception(), PeerGone) for future in done)


def test_one_broken_disk_does_not_stop_the_others() -> None:
    with (
        FakeBackend() as good,
        FakeBackend(device=using(9)) as bad,
        vhostuser.connect(good.give()) as disk,
        vhostuser.connect(bad.give()) as broken,
    ):
        futures = disk.submit_all([Write(at * 512, bytes([at]) * 512) for at in range(100)])
        with pytest.raises(RemoteRingError):
            broken.read(0, 512)
        assert not wait(futures, WAIT_S).not_done
        assert disk.read(99 * 512, 512) == b"\x63" * 512


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"protocol": fakes.ALL & ~fakes.CONFIG}, "does not offer protocol feature CONFIG"),
        ({"features": fakes.VERSION_1}, "does not offer protocol feature CONFIG"),
        ({"space": config(blk_size=0)}, "its block size is 0"),
        ({"space": config(blk_size=1000)}, "its block size is 1000"),
        ({"space": config((1 << 64) - 1)}, "its capacity is 18446744073709551615 sectors"),
        ({"queues": 0}, "it has no queues"),
    ],
)
def test_why_a_back_end_cannot_be_driven_is_said(arguments: dict[str, Any], why: str) -> None:
    with FakeBackend(**arguments) as backend, pytest.raises(BackendUnfit, match=why):
        vhostuser.connect(backend.give())


def test_a_configuration_that_nobody_gets_is_said_after_all_sizes_were_asked_for() -> None:
    refusing = {24: lambda backend, received: message(24)}
    with FakeBackend(answers=refusing) as backend:
        with pytest.raises(BackendUnfit, match="does not tell its configuration: the back-end refused GET_CONFIG of 8"):
            vhostuser.connect(backend.give())
        assert [struct.unpack_from("=I", asked, 4)[0] for asked in backend.payloads(24)] == [60, 36, 8]


def test_a_short_configuration_is_enough() -> None:
    def short(backend: FakeBackend, received: Received) -> bytes | None:
        size = struct.unpack_from("=I", received.payload, 4)[0]
        return message(24) if size > 36 else backend.polite(received)

    with FakeBackend(answers={24: short}) as backend, vhostuser.connect(backend.give()) as client:
        assert client.size == 2048 * 512
        client.write(0, bytes(512))


@pytest.mark.parametrize("request_", [24, 2, 37, 12, 18])
def test_a_back_end_that_goes_while_it_is_set_up_leaves_nothing(request_: int) -> None:
    with (
        FakeBackend(answers={request_: lambda backend, received: Hangup()}) as backend,
        pytest.raises((PeerGone, RemoteProtocolError)),
    ):
        vhostuser.connect(backend.give())


def test_a_back_end_that_goes_while_it_is_stopped_lets_close_return() -> None:
    with FakeBackend(answers={11: lambda backend, received: Hangup()}) as backend:
        client = vhostuser.connect(backend.give())
        client.write(0, bytes(512))
        client.close()
        assert not client.connected


def test_a_capacity_that_becomes_nonsense_ends_the_connection() -> None:
    with FakeBackend(protocol=fakes.ALL) as backend, vhostuser.connect(backend.give()) as client:
        backend.space[:8] = b"\xff" * 8
        assert backend.channel is not None
        backend.channel.sendall(message(2, b"", 1))
        with pytest.raises(PeerGone, match="says now that it has 18446744073709551615 sectors"):
            client.wait_config_change(WAIT_S)


@pytest.mark.parametrize(("size_max", "seg_max"), [(4096, 8), (1000, 4), (100, 6), (0, 1), (512, 126)])
def test_segments_keep_to_what_the_disk_takes(size_max: int, seg_max: int) -> None:
    space = config(size_max=size_max, seg_max=seg_max)
    features = fakes.SIZE_MAX | fakes.SEG_MAX | fakes.VERSION_1 | fakes.PROTOCOL | fakes.INDIRECT
    data = os.urandom(64 << 10)
    with (
        FakeBackend(space=space, features=features) as backend,
        vhostuser.connect(backend.give()) as client,
        client.allocate(len(data)) as buffer,
    ):
        client.write(0, data)
        buffer.view[:] = bytes(len(data))
        client.readinto(0, buffer)
        assert buffer.view == data
        client.readinto(0, [buffer[:1024], buffer[4096:]])
        for chain in backend.chains:
            assert len(chain) <= seg_max + 2
            assert all(length <= (size_max or 1 << 20) for _, length, _ in chain)
            assert sum(length for _, length, _ in chain[1:-1]) % 512 == 0


def test_discards_and_zeroes_keep_to_what_the_disk_takes() -> None:
    features = fakes.DISCARD | fakes.WRITE_ZEROES | fakes.VERSION_1 | fakes.PROTOCOL
    asked: list[tuple[int, list[tuple[int, int, int]]]] = []

    def device(backend: FakeBackend, ring: Ring) -> None:
        while (head := backend.take(ring)) is not None:
            header, ranges, _ = backend.chain(ring, head)
            kind = struct.unpack("<I", backend.at(header[0], 4))[0]
            asked.append((kind, list(struct.iter_unpack("<QII", backend.at(*ranges[:2])))))
            backend.chains.clear()
            backend.at(backend.chain(ring, head)[-1][0], 1)[0] = 0
            backend.put(ring, head, 1)
        backend.call(ring)

    with FakeBackend(features=features, device=device) as backend, vhostuser.connect(backend.give()) as client:
        client.discard(512, 200 * 512)
        client.write_zeroes(0, 200 * 512, unmap=True)
    assert asked[:2] == [(11, [(1, 63, 0), (64, 64, 0)]), (11, [(128, 64, 0), (192, 9, 0)])]
    assert asked[2:] == [(13, [(0, 128, 1)]), (13, [(128, 72, 1)])]


def test_a_disk_without_a_cache_gets_no_flush() -> None:
    with (
        FakeBackend(features=fakes.VERSION_1 | fakes.PROTOCOL) as backend,
        vhostuser.connect(backend.give()) as client,
    ):
        client.flush()
        assert not client.write_cache
        client.read(0, 512)
        assert len(backend.chains) == 1


def test_a_connection_that_was_handed_over_cannot_be_made_again() -> None:
    ours, theirs = Transport.pair()
    with ours, pytest.raises(vhostuser.UsageError, match="cannot be connected to again"):
        vhostuser.connect(ours, reconnect=Backoff())
    theirs.close()


def test_data_is_moved_as_the_disk_sees_it() -> None:
    with FakeBackend(device=serve_disk) as backend, vhostuser.connect(backend.give()) as client:
        client.write(1024, b"abcd" * 256)
        assert bytes(backend.disk[1024:2048]) == b"abcd" * 256
