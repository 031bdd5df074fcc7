"""Debian packages in private prefixes: fetched by apt, unpacked by dpkg, nothing installed and no root needed.

Each `Prefix` is a small root directory with everything its programs link to, so that several QEMU versions live side by
side whatever the machine itself has installed. apt runs with a state directory and an empty package database of its
own, against the archive that the machine's own sources name. Touches: the cache directory, the network through apt.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = PROJECT / ".cache" / "guest"
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE: Final = "VHOSTUSER_DEBIAN_MIRROR"
ARCHITECTURE: Final = "amd64"
MULTIARCH: Final = "x86_64-linux-gnu"
PRIVATE_LIBRARIES: Final = ("pulseaudio", "ceph", "blas")  # directories that programs name in their run path


class PackagesError(Exception):
    """Packages cannot be had here; the message says why and what to do."""


def mirror() -> str:
    """The Debian archive to use: the environment's choice, else the one that the machine's apt sources name."""
    chosen = os.environ.get(MIRROR_VARIABLE)
    if chosen:
        return chosen.rstrip("/")
    if shutil.which("apt-get") is None:
        raise PackagesError("this machine has no apt-get; guests are built from Debian's packages")
    chosen_format = ["--no-release-info", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"]
    listing = [line.split() for line in _output(["apt-get", "indextargets", *chosen_format]).splitlines()]
    release = platform.freedesktop_os_release().get("VERSION_CODENAME")
    by_name = [location for _, location in listing if location.rstrip("/").endswith("/debian")]
    by_release = [location for suite, location in listing if suite == release and _is_debian()]
    for location in by_name + by_release:
        return location.rstrip("/")
    raise PackagesError(f"no Debian archive among the apt sources of this machine; name one in {MIRROR_VARIABLE}")


@dataclass(frozen=True, slots=True)
class Prefix:
    """An unpacked set of packages under ``root``; its programs run through its own loader and libraries."""

    root: Path

    def command(self, program: str) -> list[str]:
        """The start of a command line that runs ``program`` (a path inside the prefix) with the prefix's libraries."""
        return [str(self.loader()), "--library-path", self.library_path(), str(self.root / program.lstrip("/"))]

    def loader(self) -> Path:
        """The dynamic loader of the prefix."""
        for place in (f"lib/{MULTIARCH}", f"usr/lib/{MULTIARCH}"):
            candidate = self.root / place / "ld-linux-x86-64.so.2"
            if candidate.is_file() and not candidate.is_symlink():
                return candidate
        raise PackagesError(f"{self.root} has no dynamic loader; remove the directory and prepare again")

    def library_path(self) -> str:
        """The directories of the prefix that hold shared libraries, for the loader."""
        parents = (f"lib/{MULTIARCH}", f"usr/lib/{MULTIARCH}")
        places = [*parents, *(f"{parent}/{name}" for parent in parents for name in PRIVATE_LIBRARIES)]
        return ":".join(str(self.root / place) for place in places if (self.root / place).is_dir())

    def versions(self) -> dict[str, str]:
        """Name and version of every package in the prefix, as it was unpacked."""
        listing = json.loads((self.root / READY).read_text())["packages"]
        return {str(name): str(version) for name, version in listing.items()}


READY: Final = "prefix.json"


@dataclass(frozen=True, slots=True)
class Archive:
    """The archive seen through ``suites``, the last of which is preferred; state lies below ``CACHE / name``."""

    name: str
    suites: tuple[str, ...]

    @property
    def directory(self) -> Path:
        """Where apt's state, the downloads and the prefixes of this archive lie."""
        return CACHE / self.name

    def prefix(self, label: str, packages: Sequence[str], *, closure: bool = True) -> Prefix:
        """The prefix ``label`` holding ``packages`` (with ``closure``, all they need too), unpacked when it is not.

        A prefix that was made for the same list is used as it is, without the network.
        """
        root = self.directory / label
        wanted = sorted(packages)
        if self.ready(label, packages):
            return Prefix(root)
        with _alone():
            if not self.ready(label, packages):
                self._make(root, label, wanted, closure=closure)
        return Prefix(root)

    def _make(self, root: Path, label: str, wanted: list[str], *, closure: bool) -> None:
        self._update()
        shutil.rmtree(root, ignore_errors=True)
        partial = root.with_name(root.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        downloads = self._download(label, wanted, closure=closure)
        for package in downloads:
            _run(["dpkg-deb", "--extract", str(package), str(partial)])
        facts = {"wanted": wanted, "packages": dict(_named(package) for package in downloads)}
        (partial / READY).write_text(json.dumps(facts, indent=1))
        partial.rename(root)
        shutil.rmtree(self.directory / "archives" / label)

    def ready(self, label: str, packages: Sequence[str]) -> bool:
        """Whether the prefix ``label`` is there, made for exactly ``packages``."""
        marker = self.directory / label / READY
        return marker.is_file() and json.loads(marker.read_text())["wanted"] == sorted(packages)

    def dependencies(self, package: str) -> list[str]:
        """What ``package`` depends on directly, by name."""
        self._update()
        listing = _output(["apt-cache", *self._options(), "depends", "--no-recommends", "--no-suggests", package])
        marks = (line.strip().partition(": ") for line in listing.splitlines())
        return [name for kind, _, name in marks if kind == "Depends"]

    def _options(self) -> list[str]:
        base = self.directory / "apt"
        settings = {
            "Dir": base,
            "Dir::State::status": base / "status",
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "APT::Default-Release": self.suites[-1],
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]

    def _update(self) -> None:
        """Make apt's private state and fetch the indexes, once per archive and process."""
        if self.name in _UPDATED:
            return
        base = self.directory / "apt"
        for place in ("etc/apt/preferences.d", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial"):
            (base / place).mkdir(parents=True, exist_ok=True)
        (base / "status").touch()
        signed = f" signed-by={KEYRING}" if KEYRING.is_file() else ""
        lines = [f"deb [arch={ARCHITECTURE}{signed}] {mirror()} {suite} main\n" for suite in self.suites]
        (base / "etc/apt/sources.list").write_text("".join(lines))
        _run(["apt-get", *self._options(), "-q", "update"])
        _UPDATED.add(self.name)

    def _download(self, label: str, packages: Sequence[str], *, closure: bool) -> list[Path]:
        place = self.directory / "archives" / label
        shutil.rmtree(place, ignore_errors=True)
        (place / "partial").mkdir(parents=True)
        if closure:
            only = ["-o", f"Dir::Cache::archives={place}", "-y", "-q", "--download-only", "install"]
            _run(["apt-get", *self._options(), *only, *packages])
        else:
            _run(["apt-get", *self._options(), "-q", "download", *packages], cwd=place)
        return sorted(place.glob("*.deb"))


_UPDATED: Final[set[str]] = set()


@contextmanager
def _alone() -> Iterator[None]:
    """Hold the cache's lock: one process fetches and unpacks, others wait for it and find its work done."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _is_debian() -> bool:
    return platform.freedesktop_os_release().get("ID") == "debian"


def _named(package: Path) -> tuple[str, str]:
    name, _, version = _output(["dpkg-deb", "--show", str(package)]).strip().partition("\t")
    return name, version


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PackagesError(f"`{command[0]}` failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise PackagesError(f"`{' '.join(command[:1])}` failed: {done.stdout.strip()[-2000:]}")
