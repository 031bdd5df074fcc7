"""The random load in the background of a guest, and what it knew checked against the image on the host.

Touches: guests through their shell, images through the load itself, run on the host.
"""

from __future__ import annotations

import base64
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .machines import Guest
from .prepare import Machine

STOP_S: Final = 90.0
BLOCK: Final = 512
GENERATION: Final = 4
"""Bytes of a load's model for each block."""

TROUBLE: Final = re.compile(
    r".*(?:I/O error|is not a head|blocked for more than|timed out|critical target|EXT4-fs error|BUG:|Oops).*"
)
"""What a guest's kernel says when a disk did not keep its word."""


@dataclass(slots=True)
class RandomLoad:
    """Random reads and writes of one disk; every write is read back at once, and everything at the end."""

    device: str  # as in vda
    image: Path
    threads: int = 4
    options: str = "--largest=256K"
    known: bool = False  # the image was blank at the first start: every block is verified, not only what one run wrote
    _starts: int = field(default=0, init=False)

    def start(self, guest: Guest) -> None:
        """Begin, in the background; ``guest`` may be another one than the last time if that one has moved there."""
        words = f"--direct --read-back --threads={self.threads} --model={self._path('model')} {self.options}"
        first = ""
        if self.known:
            self._starts += 1
            words += f" --continue --seed={self._starts}"
            if self._starts == 1:
                first = f"head -c {self.image.stat().st_size // BLOCK * GENERATION} /dev/zero >{self._path('model')}; "
        guest.run(
            f"{first}rm -f {self._path('said')}; (load {words} /dev/{self.device} >{self._path('out')} 2>&1; "
            f"echo status $? >>{self._path('out')}; mv {self._path('out')} {self._path('said')}) & "
        )

    def wait_writes(self, guest: Guest, sectors: int = 512) -> None:
        """Wait until the guest has written so many sectors more to the disk, by whatever program."""
        written = f"$(awk '{{print $7}}' /sys/block/{self.device}/stat)"
        guest.run(
            f"before={written}; until [ {written} -ge $((before + {sectors})) ]; do "
            f"if [ -e {self._path('said')} ]; then cat {self._path('said')}; exit 1; fi; usleep 20000; done",
            STOP_S,
        )

    def ended(self, guest: Guest) -> dict[str, float]:
        """Have every load of the guest end, and return the numbers of this one; raises when it saw anything wrong."""
        said = guest.run(
            "for load in $(pidof load); do kill $load 2>/dev/null; done; "
            f"until [ -e {self._path('said')} ]; do usleep 50000; done; cat {self._path('said')}",
            STOP_S,
        )
        assert said.startswith("load: ok") and "status 0" in said, f"{self.device}: {said}"  # noqa: PT018
        return {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", said)}

    def check(self, guest: Guest, machine: Machine) -> None:
        """Read the disk once more, in the guest and around it on the host: each block holds what the load knew."""
        words = f"--against={self._path('model')} --threads={self.threads} {self.options}"
        said = guest.run(f"load --direct {words} /dev/{self.device}", STOP_S)
        assert said.startswith("load: ok"), f"{self.device}: {said}"
        self._model().write_bytes(base64.b64decode(guest.run(f"base64 {self._path('model')}", STOP_S)))
        self.check_image(machine)

    def check_image(self, machine: Machine) -> None:
        """The part of `check` that is done on the host; may be repeated while nobody writes to the disk."""
        options = " ".join([f"--against={self._model()}", f"--threads={self.threads}", self.options])
        words = [word for word in options.split() if word != "--discard"]
        command = [str(machine.load), *words, str(self.image)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{self.image}: {done.stdout}"

    def _model(self) -> Path:
        return self.image.with_suffix(".model")

    def _path(self, what: str) -> str:
        return f"/tmp/{self.device}.{what}"


def trouble(guest: Guest) -> list[str]:
    """The lines of the guest's kernel log, of all its boots, that a guest with a good disk does not write."""
    return [found.group().strip() for found in TROUBLE.finditer(guest.console())]
