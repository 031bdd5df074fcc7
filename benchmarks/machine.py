"""What the numbers were measured on. Touches: /proc, files."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.guest.packages import PROJECT


def facts(program: Sequence[str], peer: str) -> dict[str, str]:
    """The machine and the versions, for people."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": f"{_processor()}, {os.cpu_count()} of them",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "virtual machine": "yes" if " hypervisor" in Path("/proc/cpuinfo").read_text() else "no",
        "/dev/kvm": "yes" if os.path.exists("/dev/kvm") else "no: guests run under TCG",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "vhostuser": f"{_said([*program, '--version'])}, revision {_revision()}",
        "peer": peer,
        "load average at the start": " ".join(f"{value:.2f}" for value in os.getloadavg()),
    }


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on."""
    best, kind = "", "unknown"
    place = str(directory.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, found, *_ = line.split()
        if (place == point or place.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, found
    return kind


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _revision() -> str:
    said = _said(["git", "-C", str(PROJECT), "describe", "--always", "--dirty"])
    return said or "unknown"


def _said(words: Sequence[str]) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, cwd="/").stdout.strip()
    except OSError:
        return ""
