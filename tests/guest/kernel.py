"""The guest's kernel: taken out of Debian's package, uncompressed, with the modules a guest needs in loading order.

Touches: files below the kernel's prefix and the file it is asked to write.
"""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .packages import PackagesError, Prefix

SETUP_SECTORS: Final = 0x1F1  # Linux x86 boot protocol: setup_sects, 0 means 4
PAYLOAD: Final = 0x248  # payload_offset and payload_length, two le32, counted from the protected-mode code
PROGRAMS: Final = {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4"}  # by the payload's first bytes
XZ: Final = b"\xfd7zXZ\x00"
GZIP: Final = b"\x1f\x8b"
SECTOR: Final = 512


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel package unpacked below ``root``."""

    root: Path

    @property
    def image(self) -> Path:
        """The compressed kernel as the package ships it."""
        return self._one("boot/vmlinuz-*")

    @property
    def release(self) -> str:
        """The kernel's release, as ``uname -r`` prints it in the guest."""
        return self.image.name.removeprefix("vmlinuz-")

    def unpack(self, target: Path, tools: Prefix) -> None:
        """Write the uncompressed ELF to ``target`` (it starts through its PVH note) with a program of ``tools``."""
        partial = target.with_suffix(".partial")
        partial.write_bytes(uncompressed(self.image.read_bytes(), tools))
        partial.rename(target)

    def modules(self, wanted: Iterable[str]) -> list[Path]:
        """The files of ``wanted`` modules and of all they need, in loading order; built-in ones are left out."""
        files = {_plain(path.name.split(".ko")[0]): path for path in self._directory().rglob("*.ko*")}
        ordered: dict[str, Path] = {}
        for name in wanted:
            for needed in self._order(_plain(name), files):
                ordered[needed] = files[needed]
        return list(ordered.values())

    def _order(self, name: str, files: dict[str, Path]) -> Iterator[str]:
        if name not in files:
            if name in self._builtin():
                return
            raise PackagesError(f"kernel {self.release} has no module {name}")
        for needed in dependencies(files[name].read_bytes()):
            yield from self._order(needed, files)
        yield name

    def _builtin(self) -> set[str]:
        listing = (self._directory() / "modules.builtin").read_text().split()
        return {_plain(Path(line).name.removesuffix(".ko")) for line in listing}

    def _directory(self) -> Path:
        for place in ("lib/modules", "usr/lib/modules"):
            if (self.root / place / self.release).is_dir():
                return self.root / place / self.release
        raise PackagesError(f"{self.root} holds no modules of kernel {self.release}")

    def _one(self, pattern: str) -> Path:
        found = sorted(self.root.glob(pattern))
        if len(found) != 1:
            raise PackagesError(f"{self.root} holds {len(found)} files {pattern}, not one; remove it and prepare again")
        return found[0]


def uncompressed(image: bytes, tools: Prefix) -> bytes:
    """The ELF inside a bzImage, found through the boot protocol's header."""
    setup_sectors = image[SETUP_SECTORS] or 4
    offset, length = struct.unpack_from("<II", image, PAYLOAD)
    start = (setup_sectors + 1) * SECTOR + offset
    payload = image[start : start + length]
    (size,) = struct.unpack_from("<I", payload, len(payload) - 4)  # the build appends the uncompressed size
    if payload[:4] in PROGRAMS:
        command = [*tools.command(f"usr/bin/{PROGRAMS[payload[:4]]}"), "-d", "-q", "-c"]
        elf = subprocess.run(command, input=payload[:-4], capture_output=True, check=False).stdout
    elif payload.startswith(XZ):
        elf = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(GZIP):
        elf = zlib.decompressobj(wbits=31).decompress(payload)
    else:
        raise PackagesError(f"kernel payload starts with {payload[:6].hex()}: no compression known here")
    if len(elf) != size or not elf.startswith(b"\x7fELF"):
        raise PackagesError(f"kernel payload unpacks to {len(elf)} bytes, not to an ELF of {size}")
    return elf


def dependencies(module: bytes) -> list[str]:
    """The modules that a module names as needed before it, hard (``depends``) and soft (``softdep pre:``)."""
    names: list[str] = []
    for found in re.finditer(rb"\0(?:depends=([^\0]*)|softdep=pre: ([^\0]*))\0", module):
        text = (found.group(1) or found.group(2) or b"").decode()
        names += [_plain(name) for name in re.split(r"[,\s]+", text) if name]
    return names


def _plain(name: str) -> str:
    return name.replace("-", "_")
