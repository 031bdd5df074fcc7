"""A guest of the soak run: loads, resets, reboots, switches of the write cache. Touches one QEMU."""

from __future__ import annotations

import random
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.guest.loads import RandomLoad, trouble
from tests.guest.machines import Disk, Guest, Setup
from tests.guest.prepare import Machine, Qemu

LOAD_S: Final = 5.0
REST_S: Final = 10.0
REBIND: Final = (
    "for disk in virtio0 virtio1; do echo $disk >/sys/bus/virtio/drivers/virtio_blk/unbind; done; "
    "for disk in virtio0 virtio1; do echo $disk >/sys/bus/virtio/drivers/virtio_blk/bind; done; "
    "until [ -b /dev/vda ] && [ -b /dev/vdb ]; do usleep 20000; done"
)


class GuestLoad:
    """Two disks of one guest, loaded and rested, with a reset of some kind in between."""

    def __init__(self, qemu: Qemu, machine: Machine, place: Path, disks: list[tuple[Disk, Path]], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._machine = machine
        self._drawn = random.Random(seed)
        self._stack = ExitStack()
        self.guest = self._stack.enter_context(
            Guest(qemu, machine, place, [disk for disk, _ in disks], Setup(cpus=2, memory_mib=256))
        )
        self._loads = [
            RandomLoad(f"vd{letter}", image, 2, "--largest=64K --size=8M --discard")
            for letter, (_, image) in zip("ab", disks, strict=True)
        ]

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``; raises as soon as a block is wrong or the guest's kernel complains."""
        with self._stack:
            self.guest.wait_ready()
            while not stop.is_set():
                for load in self._loads:
                    load.start(self.guest)
                stop.wait(LOAD_S)
                for load in self._loads:
                    said = load.ended(self.guest)
                    self.counts["requests"] += int(said["writes"] + said["reads"] + said["flushes"])
                    load.check(self.guest, self._machine)
                self._disturb()
                for load in self._loads:
                    load.check_image(self._machine)
                found = trouble(self.guest)
                assert not found, found
                stop.wait(REST_S)

    def _disturb(self) -> None:
        what = self._drawn.random()
        if what < 0.1:
            self.guest.reset()
            self.counts["machine_resets"] += 1
        elif what < 0.2:
            self.guest.reboot()
            self.counts["reboots"] += 1
        elif what < 0.7:
            self.guest.run(REBIND)
            self.counts["device_resets"] += 1
        else:
            mode = self._drawn.choice(("write back", "write through"))
            # Only of the disk that lives: QEMU 10.0 aborts when a guest does it while no back-end is connected.
            self.guest.run(f"echo {mode} >/sys/block/vda/cache_type")
            self.counts["write_cache_switches"] += 1
