"""Initial RAM disks: a writer of newc archives, and the base archive that every guest starts from.

Archives may be concatenated, so a test appends its own files to the base. Touches: files it is asked to read or write.
"""

from __future__ import annotations

import re
import stat
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from .packages import PackagesError, Prefix

MAGIC: Final = "070701"
TRAILER: Final = "TRAILER!!!"
ALIGN: Final = 4
DIRECTORIES: Final = ("dev", "proc", "sys", "run", "tmp", "mnt", "root", "modules", "usr")
PROFILE: Final = "etc/profile"
LOADER: Final = "lib64/ld-linux-x86-64.so.2"


@dataclass(slots=True)
class Archive:
    """A newc archive in the making; parents are added before their children."""

    _entries: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def directory(self, path: str) -> None:
        """Add a directory and its parents."""
        for parent in [*reversed(PurePosixPath(path).parents), PurePosixPath(path)]:
            if str(parent) != ".":
                self._entries.setdefault(str(parent), (stat.S_IFDIR | 0o755, b""))

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file, in place of one of that name."""
        self.directory(str(PurePosixPath(path).parent))
        self._entries[path] = (stat.S_IFREG | mode, content)

    def extract(self, directory: Path) -> None:
        """Write the archive's files below ``directory``, which is made."""
        directory.mkdir()
        for path, (mode, content) in self._entries.items():
            if stat.S_ISDIR(mode):
                (directory / path).mkdir()
            else:
                (directory / path).write_bytes(content)
                (directory / path).chmod(stat.S_IMODE(mode))

    def pack(self) -> bytes:
        """The archive's bytes, padded so that another archive may follow."""
        parts = [_entry(number, path, *entry) for number, (path, entry) in enumerate(self._entries.items(), start=1)]
        packed = b"".join([*parts, _entry(0, TRAILER, 0, b"")])
        return packed + b"\0" * (-len(packed) % 512)


def _entry(number: int, path: str, mode: int, content: bytes) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name), 0)
    head = (MAGIC + "".join(f"{value:08X}" for value in fields)).encode() + name
    head += b"\0" * (-len(head) % ALIGN)
    return head + content + b"\0" * (-len(content) % ALIGN)


@dataclass(frozen=True, slots=True)
class Base:
    """What goes into the base archive."""

    tools: Prefix
    programs: tuple[str, ...]  # paths inside `tools`, dynamically linked
    busybox: str  # likewise, static
    modules: tuple[Path, ...]  # in loading order
    files: Mapping[str, Path]  # our own, by path in the guest; executable

    def archive(self) -> Archive:
        """Build the archive: programs and the libraries they link to, busybox, modules, our own files."""
        archive = Archive()
        for path in DIRECTORIES:
            archive.directory(path)
        archive.file("bin/busybox", (self.tools.root / self.busybox).read_bytes(), 0o755)
        archive.file(LOADER, self.tools.loader().read_bytes(), 0o755)
        for program in self.programs:
            archive.file(program, (self.tools.root / program).read_bytes(), 0o755)
        for library in libraries(self.tools, self.programs):
            archive.file(f"lib/{library.name}", library.read_bytes(), 0o755)
        for number, module in enumerate(self.modules):
            archive.file(f"modules/{number:02d}-{module.name}", module.read_bytes())
        archive.file(PROFILE, "".join(_preferred(program) for program in self.programs).encode())
        for path, source in self.files.items():
            archive.file(path, source.read_bytes(), 0o755)
        return archive


def _preferred(program: str) -> str:
    """A shell function for ``program``: busybox's shell would take its own applet of that name, whatever PATH says."""
    name = PurePosixPath(program).name
    return "" if "." in name else f'{name}() {{ /{program} "$@"; }}\n'


def libraries(prefix: Prefix, programs: Iterable[str]) -> list[Path]:
    """The shared libraries that ``programs`` load, as files of ``prefix``."""
    found: dict[str, Path] = {}
    for program in programs:
        loader, *rest = prefix.command(program)
        done = subprocess.run([loader, "--list", *rest], capture_output=True, text=True, check=False)
        if done.returncode or "not found" in done.stdout:
            raise PackagesError(f"{program} does not find its libraries: {done.stdout}{done.stderr}")
        for name, path in re.findall(r"^\s*([^\s/]+) => (\S+) \(", done.stdout, re.MULTILINE):
            found[name] = Path(path)
    return list(found.values())
