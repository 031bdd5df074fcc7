"""Disk images for the tests: blank, bootable, with a root file system; what the host sees of them. Touches: files."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Final

from .packages import CACHE, PackagesError, Prefix
from .prepare import HERE, Machine, base, built

MIB: Final = 1 << 20
SECTOR: Final = 512
STAT_UNIT: Final = 512
BOOT_CHUNKS: Final = 64
BOOT_CHUNK_SECTORS: Final = 64


def blank(path: Path, size: int) -> Path:
    """Make a sparse file of ``size`` bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def noise(path: Path, size: int, seed: int = 1) -> Path:
    """Make a file of ``size`` random bytes, the same for the same seed."""
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def allocated(path: Path) -> int:
    """Bytes of storage that a file takes."""
    return path.stat().st_blocks * STAT_UNIT


def digest(path: Path, offset: int = 0, length: int | None = None) -> str:
    """The SHA-256 of a run of bytes, in hexadecimal, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.sha256(file.read() if length is None else file.read(length)).hexdigest()


def root_file_system(path: Path, size: int, machine: Machine) -> Path:
    """Make an image with an ext4 file system that a guest can use as its root: what the initramfs holds, on a disk."""
    archive = base(machine.tools, (), machine.load).archive()
    archive.file(".switched", b"")  # tells init that this is the root it was looking for
    tree = path.with_suffix(".tree")
    archive.extract(tree)
    blank(path, size)
    run_tool(machine.tools, "sbin/mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(path))
    return path


def bootable(path: Path, seed: int = 1) -> tuple[Path, int]:
    """Make an image that boots `boot.S` over random bytes; returns it with the sum that the boot sector must print."""
    flags = ["-m32", "-nostdlib", "-no-pie", "-Wl,-N", "-Wl,--build-id=none", "-Wl,-Ttext=0x7c00"]
    flags += ["-Wl,--oformat=binary", f"-DCHUNKS={BOOT_CHUNKS}", f"-DCHUNK_SECTORS={BOOT_CHUNK_SECTORS}"]
    sector = built(HERE / "boot.S", CACHE / "machine" / "boot", flags).read_bytes()
    data = random.Random(seed).randbytes(BOOT_CHUNKS * BOOT_CHUNK_SECTORS * SECTOR)
    folded = 0
    for (word,) in struct.iter_unpack("<I", data):
        folded = ((folded << 1 | folded >> 31) & 0xFFFFFFFF) ^ word
    path.write_bytes(sector + data + bytes(MIB - SECTOR))
    return path, folded


def written_sum(path: Path) -> int:
    """The sum that the boot sector wrote behind the data that it read."""
    with path.open("rb") as file:
        file.seek((1 + BOOT_CHUNKS * BOOT_CHUNK_SECTORS) * SECTOR)
        return int.from_bytes(file.read(4), "little")


def run_tool(tools: Prefix, program: str, *words: str) -> str:
    """Run a program of the tools' prefix on the host and return its output; raises `PackagesError` when it fails."""
    environment = {**os.environ, "MKE2FS_CONFIG": str(tools.root / "etc/mke2fs.conf")}
    done = subprocess.run(
        [*tools.command(program), *words], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise PackagesError(f"{program} {' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout
