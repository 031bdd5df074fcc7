"""The crash-proof load: sweeps that report every flushed round in the kernel log, and the check after a crash.

Touches: guests, only through their shell and console.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .machines import Guest
from .prepare import Machine

REPORT = re.compile(r"load: thread (\d+) flushed round (\d+) of (\S+)")


@dataclass(slots=True)
class Sweep:
    """Rounds of writes over a device by several threads, and what each thread has reported as flushed."""

    device: str
    threads: int = 3
    options: str = "--direct --largest=1M"
    floors: list[int] = field(default_factory=list)  # the last reported round of each thread

    def __post_init__(self) -> None:
        self.floors = [0] * self.threads

    def start(self, guest: Guest) -> None:
        """Start sweeping in the background of the guest, after the rounds that have been reported before."""
        log = f"/tmp/sweep-{self.device.rpartition('/')[2]}"
        words = f"--sweep --from={self._floors()} --on-error=end {self.options} {self.device}"
        guest.run(f"dmesg -c >/dev/null; rm -f {log}; (load {words}; echo status $?) >{log} 2>&1 &")

    def wait_rounds(self, guest: Guest, rounds: int, limit_s: float = 90.0) -> None:
        """Wait until the threads together have reported ``rounds`` rounds since the start, each at least one."""
        guest.run(
            f"said() {{ dmesg | grep 'flushed round [0-9]* of {self.device}$'; }}; "
            f"until [ $(said | wc -l) -ge {rounds} ] && "
            f"[ $(said | grep -o 'thread [0-9]* flushed' | sort -u | wc -l) = {self.threads} ]; do "
            f"grep status /tmp/sweep-{self.device.rpartition('/')[2]} && exit 1; usleep 50000; done",
            limit_s,
        )

    def ended(self, guest: Guest, limit_s: float = 60.0) -> str:
        """Wait for the load to end by itself and return what it said; raises when it found a wrong block."""
        log = f"/tmp/sweep-{self.device.rpartition('/')[2]}"
        said = guest.run(f"until grep -q status {log}; do usleep 50000; done; cat {log}", limit_s)
        assert "status 0" in said, said
        self.note(guest)
        return said

    def note(self, guest: Guest) -> None:
        """Take the reported rounds out of the guest's console."""
        for thread, round_number, device in REPORT.findall(guest.console()):
            if device != self.device:
                continue
            self.floors[int(thread)] = max(self.floors[int(thread)], int(round_number))

    def check(self, guest: Guest, limit_s: float = 120.0) -> str:
        """Verify every block of the device against the reported rounds."""
        assert all(self.floors), f"not every thread has reported a round: {self.floors}"
        said = guest.run(f"load --check={self._floors()} {self.options} {self.device}", limit_s)
        assert said.startswith("load: ok"), said
        return said

    def check_image(self, machine: Machine, image: Path) -> None:
        """The same around the disk, on the host, once nobody writes any more."""
        words = [f"--check={self._floors()}", *self.options.replace("--direct", "").split(), str(image)]
        done = subprocess.run([str(machine.load), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{image}: {done.stdout}"

    def _floors(self) -> str:
        return ",".join(str(floor) for floor in self.floors)
