"""What guests are made of: the QEMU versions, the kernel, the base initramfs; and the command that fetches them all.

``python -m tests.guest.prepare [QEMU VERSION...]`` fetches what is missing; without arguments it prepares the versions
that the guest tests cover. Touches: the cache directory, the network through apt, the C compiler.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .initramfs import Base
from .kernel import Kernel
from .packages import CACHE, Archive, PackagesError, Prefix

HERE: Final = Path(__file__).resolve().parent
STABLE: Final = Archive("bookworm", ("bookworm-updates", "bookworm"))
BACKPORTS: Final = Archive("backports", ("bookworm", "bookworm-backports"))
UNSTABLE: Final = Archive("sid", ("sid",))
KERNEL_PACKAGE: Final = "linux-image-cloud-amd64"
MODULES: Final = ("virtio_pci", "virtio_blk", "ext4")
TOOL_PACKAGES: Final = ("busybox-static", "coreutils", "e2fsprogs", "fdisk", "lz4", "util-linux", "zstd")
PROGRAMS: Final = (
    "bin/dd",
    "bin/lsblk",
    "sbin/blkdiscard",
    "sbin/blockdev",
    "sbin/dumpe2fs",
    "sbin/e2fsck",
    "sbin/fstrim",
    "sbin/mke2fs",
    "sbin/mkfs.ext4",
    "sbin/resize2fs",
    "sbin/sfdisk",
)


@dataclass(frozen=True, slots=True)
class Qemu:
    """One QEMU: how to run its programs."""

    version: tuple[int, int]
    prefix: Prefix | None = None  # None: the one installed on this machine

    @property
    def name(self) -> str:
        """The version as people write it."""
        return ".".join(str(part) for part in self.version)

    def command(self, program: str = "qemu-system-x86_64") -> list[str]:
        """The start of a command line for one of its programs."""
        if self.prefix is None:
            return [program]
        command = self.prefix.command(f"usr/bin/{program}")
        if program.startswith("qemu-system"):
            for place in ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"):
                command += ["-L", str(self.prefix.root / place)]
        return command

    def environment(self) -> dict[str, str]:
        """What its programs need in the environment to find their own modules."""
        if self.prefix is None:
            return {}
        return {"QEMU_MODULE_DIR": str(self.prefix.root / "usr/lib/x86_64-linux-gnu/qemu")}


@dataclass(frozen=True, slots=True)
class Offer:
    """A QEMU version that can be prepared, and where it comes from."""

    archive: Archive
    packages: tuple[str, ...]

    def ready(self) -> bool:
        """Whether it is unpacked."""
        return self.archive.ready("qemu", self.packages)

    def fetch(self) -> Qemu:
        """The QEMU, fetched when it is not there."""
        prefix = self.archive.prefix("qemu", self.packages)
        return Qemu(parsed(prefix.versions()["qemu-system-x86"]), prefix)


OFFERS: Final = {
    "7.2": Offer(STABLE, ("qemu-system-x86",)),
    "10.0": Offer(BACKPORTS, ("qemu-system-x86",)),
    "sid": Offer(UNSTABLE, ("qemu-system-x86", "qemu-utils", "qemu-block-extra", "libblkio1")),
}
COVERED: Final = ("7.2", "10.0")


def parsed(version: str) -> tuple[int, int]:
    """Major and minor number out of a Debian version or out of what ``--version`` prints."""
    major, minor, *_ = version.rpartition(":")[2].replace("+", ".").split(".")
    return int(major), int(minor)


def installed() -> Qemu | None:
    """The QEMU of this machine, when one is installed."""
    if shutil.which("qemu-system-x86_64") is None:
        return None
    done = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True)
    return Qemu(parsed(done.stdout.split("version ")[1].split()[0]))


def present() -> list[Qemu]:
    """Every QEMU that is here, oldest first: the prepared ones, and the machine's own if it is another version."""
    found = {qemu.version: qemu for offer in OFFERS.values() if offer.ready() for qemu in [offer.fetch()]}
    own = installed()
    if own is not None:
        found.setdefault(own.version, own)
    return [found[version] for version in sorted(found)]


@dataclass(frozen=True, slots=True)
class Machine:
    """What every guest boots: an uncompressed kernel and the base initramfs."""

    kernel: Path
    initramfs: Path
    load: Path  # the self-verifying load, as built for the guest
    tools: Prefix
    release: str


def tools() -> Prefix:
    """Programs for the guest, and the few that the harness itself runs."""
    return STABLE.prefix("tools", TOOL_PACKAGES)


def machine_ready() -> bool:
    """Whether `machine` needs no network any more."""
    return STABLE.ready("tools", TOOL_PACKAGES) and bool(_kernel_package())


def machine() -> Machine:
    """The guest's kernel and initramfs, fetched and built when they are not there, or when their sources changed."""
    package = _kernel_package() or STABLE.dependencies(KERNEL_PACKAGE)[0]
    programs = tools()
    kernel = Kernel(STABLE.prefix(package, [package], closure=False).root)
    place = CACHE / "machine"
    place.mkdir(exist_ok=True)
    elf = place / f"vmlinux-{kernel.release}"
    if not elf.exists():
        kernel.unpack(elf, programs)
    load = built(HERE / "load.c", place / "load", ["-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror"])
    packed = base(programs, tuple(kernel.modules(MODULES)), load).archive().pack()
    initramfs = place / f"initramfs-{hashlib.sha256(packed).hexdigest()[:16]}"
    if not initramfs.exists():
        partial = initramfs.with_suffix(".partial")
        partial.write_bytes(packed)
        partial.rename(initramfs)
    return Machine(elf, initramfs, load, programs, kernel.release)


def base(programs: Prefix, modules: tuple[Path, ...], load: Path) -> Base:
    """What every guest finds in its first file system."""
    files = {"init": HERE / "init.sh", "bin/load": load}
    return Base(tools=programs, programs=PROGRAMS, busybox="bin/busybox", modules=modules, files=files)


def built(source: Path, target: Path, flags: Sequence[str]) -> Path:
    """``source`` compiled to ``target`` plus a hash of what it was made from; nothing is done when that file exists."""
    key = hashlib.sha256(source.read_bytes() + "\0".join(flags).encode()).hexdigest()[:16]
    output = target.with_name(f"{target.name}-{key}")
    if not output.exists():
        partial = output.with_suffix(".partial")
        command = ["cc", *flags, "-o", str(partial), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PackagesError(f"{source.name} does not compile: {done.stderr}")
        partial.rename(output)
    return output


def _kernel_package() -> str | None:
    ready = sorted(STABLE.directory.glob("linux-image-*-cloud-amd64/prefix.json"))
    return ready[-1].parent.name if ready else None


def main(names: Sequence[str]) -> int:
    """Fetch the named QEMU versions (all covered ones without a name), kernel and tools. Returns the exit status."""
    unknown = [name for name in names if name not in OFFERS]
    if unknown:
        print(f"prepare: {unknown[0]}: no such QEMU here. Choose among {', '.join(OFFERS)}", file=sys.stderr)
        return 2
    try:
        found = machine()
        print(f"prepare: kernel {found.release}")
        for name in names or COVERED:
            print(f"prepare: qemu {OFFERS[name].fetch().name}")
    except (PackagesError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
