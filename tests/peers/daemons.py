"""Back-ends of packages and of other people's crates, as processes. Touches the cache directory, cargo, processes.

``python -m tests.peers.daemons`` fetches or builds what is missing; tests skip, and say why, what could not be had.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

from tests.guest.backends import START_S, Backend, Export, NotSupportedError, Ours, StorageDaemon
from tests.guest.packages import PROJECT, PackagesError, Prefix
from tests.guest.prepare import BACKPORTS, OFFERS, Qemu, parsed
from tests.guest.processes import Child, ChildError, Deadline, readable

PROGRAM: Final = "qemu-storage-daemon"
UTILITIES: Final = ("qemu-utils",)
MANIFEST: Final = PROJECT / "native" / "peers" / "rust-vmm" / "Cargo.toml"
TARGET: Final = PROJECT / "native" / "target" / "peers"
NAMES: Final = ("ours", "qsd-7.2", "qsd-10.0", "qsd-11.1", "rust-vmm")
FETCH: Final = "run `make interop`"

Start = Callable[[Path, Path, Export], Backend]


class Unavailable(Exception):  # noqa: N818 - a fact about this machine
    """A peer cannot be had here; the text says why and what to do."""


class PreparedDaemon(StorageDaemon):
    """The storage daemon of one QEMU version, wherever it was unpacked."""

    def __init__(self, qemu: Qemu, image: Path, directory: Path, export: Export) -> None:
        self.qemu = qemu
        super().__init__(image, directory, export)

    def program(self) -> list[str]:
        """Run through the loader of its prefix."""
        return self.qemu.command(PROGRAM)

    def export_another(self, image: Path) -> Path:
        """Export a second image from the same process; returns its socket."""
        path = self.socket.with_suffix(".other")
        self._qmp.command("blockdev-add", **{"node-name": "g", "driver": "file", "filename": str(image)})
        address = {"type": "unix", "path": str(path)}
        export = {"type": "vhost-user-blk", "id": "another", "node-name": "g", "addr": address, "writable": True}
        self._qmp.command("block-export-add", **export)
        return path

    def withdraw_another(self) -> None:
        """Take it away again, once nobody is connected to it any more; returns when it is gone."""
        self._qmp.command("block-export-del", id="another", mode="hard")
        self._qmp.wait("BLOCK_EXPORT_DELETED", START_S, id="another")
        self._qmp.command("blockdev-del", **{"node-name": "g"})


class RustVmm(Backend):
    """The back-end of the rust-vmm crates; ``without`` names protocol features that it is not to offer."""

    without: tuple[str, ...] = ()

    def start(self) -> Child:
        """Start it and wait until it says that it listens."""
        export = self.export
        for name in ("read_only", "serial", "block_size", "physical_block_size", "cache", "seg_max", "engine"):
            if getattr(export, name):
                raise NotSupportedError(f"the rust-vmm back-end has no option for {name}")
        words = [str(rust_vmm_program()), "--socket", str(self.socket), "--image", str(self.image)]
        words += ["--queues", str(export.queues or 1)]
        for feature in self.without:
            words += ["--without", feature]
        ready, notice = os.pipe()
        try:
            child = Child("rust-vmm-blk", [*words, "--ready", f"/dev/fd/{notice}"], self.log, pass_fds=[notice])
        finally:
            os.close(notice)
        with open(ready, "rb") as line:
            if line not in readable([line, child], Deadline(START_S).left_s) or not line.readline():
                child.close()
                raise ChildError(f"rust-vmm-blk did not get ready: {child.tail()}")
        return child

    def stop(self) -> None:
        """It knows no other end than a signal."""
        self.kill()

    def resize(self, size: int) -> None:
        """It cannot."""
        raise NotSupportedError("the rust-vmm back-end does not resize")


@cache
def rust_vmm_program() -> Path:
    """The program, built when its sources changed. Raises `Unavailable`."""
    if shutil.which("cargo") is None:
        raise Unavailable("the rust-vmm back-end needs cargo, which is not here")
    command = ["cargo", "build", "--quiet", "--locked", "--manifest-path", str(MANIFEST), "--target-dir", str(TARGET)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"the rust-vmm back-end cannot be built here: {done.stderr.strip()[-1000:]}")
    return TARGET / "debug" / "rust-vmm-blk"


def storage_daemon(version: str, *, fetch: bool = False) -> Qemu:
    """The QEMU of that version ("7.2") that has a storage daemon here. Raises `Unavailable`, or `PackagesError`."""
    offer = OFFERS.get(version, OFFERS["sid"])
    if offer.ready() or (fetch and version != "10.0"):
        qemu = offer.fetch()
        if qemu.name == version and qemu.prefix is not None and _has_daemon(qemu.prefix):
            return qemu
    if shutil.which(PROGRAM) is not None:
        said = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
        own = Qemu(parsed(said.split("version ")[1].split()[0]))
        if own.name == version:
            return own
    if version == "10.0" and (fetch or BACKPORTS.ready("utils", UTILITIES)):  # its own package there, outside of QEMU's
        prefix = BACKPORTS.prefix("utils", UTILITIES)
        return Qemu(parsed(prefix.versions()["qemu-utils"]), prefix)
    raise Unavailable(f"the storage daemon of QEMU {version} is not here: {FETCH}")


def _has_daemon(prefix: Prefix) -> bool:
    return (prefix.root / "usr/bin" / PROGRAM).is_file()


def starter(name: str) -> Start:
    """How to start the peer called ``name``, one of `NAMES`. Raises `Unavailable`."""
    if name == "ours":
        return Ours
    if name == "rust-vmm":
        rust_vmm_program()
        return RustVmm
    try:
        qemu = storage_daemon(name.removeprefix("qsd-"))
    except PackagesError as error:
        raise Unavailable(str(error)) from None
    return lambda image, directory, export: PreparedDaemon(qemu, image, directory, export)


def main() -> int:
    """Fetch and build what is missing; returns the exit status."""
    status = 0
    for name in NAMES:
        try:
            if name.startswith("qsd-"):
                storage_daemon(name.removeprefix("qsd-"), fetch=True)
            elif name == "rust-vmm":
                rust_vmm_program()
        except (Unavailable, PackagesError, OSError) as error:
            print(f"peers: {name}: {error}", file=sys.stderr)
            status = 1
        else:
            print(f"peers: {name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
