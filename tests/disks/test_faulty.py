"""Disks that are slow and unreliable on purpose."""

from __future__ import annotations

import pytest

from vhostuser.disks import Capability, Disk, Limits, MemoryDisk
from vhostuser.disks.faulty import Faults, FaultyDisk
from vhostuser.errors import UsageError


def test_faults_are_read_from_a_text() -> None:
    faults = Faults.parse("delay-read=5ms, delay-write=1.5s,delay-flush=20us,error-read=0.25,error-write=1%,seed=7")
    assert faults.delay_read_s == pytest.approx(0.005)
    assert faults.delay_write_s == 1.5
    assert faults.delay_flush_s == pytest.approx(20e-6)
    assert (faults.error_read, faults.error_write, faults.error_flush, faults.seed) == (0.25, 0.01, 0.0, 7)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "delay-read",
        "delay-read=",
        "delay-read=5",
        "delay-read=-5ms",
        "error-read=2",
        "error-read=x",
        "speed=1",
        "seed=x",
    ],
)
def test_what_is_no_fault_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="inject"):
        Faults.parse(text)


def test_a_faulty_disk_is_the_disk_below_with_another_engine() -> None:
    with FaultyDisk(MemoryDisk(1 << 20), Faults(delay_read_s=0.001)) as disk:
        assert disk.name == "memory:size=1048576"
        assert disk.limits.size == 1 << 20
        assert Capability.DISCARD in disk.capabilities
        assert disk.engine().name == "memory"
        disk.resize(1 << 21)
        assert disk.refresh() == 1 << 21
        disk.flush()


def test_a_disk_without_an_engine_cannot_be_made_faulty() -> None:
    class Own(Disk):
        name = "own"
        limits = Limits(512)

        def read(self, offset: int, into: memoryview) -> None:
            into[:] = bytes(len(into))

    with pytest.raises(UsageError, match="native engines only"):
        FaultyDisk(Own(), Faults())
