"""The back-ends that are compared: how each is started, pinned to one processor, and ended. Touches: processes, /proc.

Ours as an operator starts it, a peer (by default the newest `qemu-storage-daemon` that is here), and the bare loop of
``benchmarks/bare.c``. None locks the image, since all serve it, one at a time.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.cases import GIB, Case
from benchmarks.results import BARE, OURS, PEER
from tests.guest.packages import PROJECT, PackagesError
from tests.peers.daemons import NAMES, PROGRAM, Unavailable, storage_daemon

START_S: Final = 30.0
END_S: Final = 20.0
LISTENS: Final = "00010000"
"""The flag of a listening socket in /proc/net/unix."""

DAEMON_POLL_NS: Final = 50_000
DAEMON: Final = (
    "--object iothread,id=io,poll-max-ns={poll_ns} "
    "--blockdev driver=file,node-name=disk,filename={image},aio=io_uring,cache.direct={direct},locking=off "
    "--export type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={socket},writable=on,"
    "num-queues={queues},iothread=io"
)


class Failed(Exception):  # noqa: N818 - what becomes of the whole run
    """A request failed, or a process did not do what it is there for."""


@dataclass(frozen=True, slots=True)
class Server:
    """One running back-end."""

    name: str
    socket: Path
    command: str
    """Its command line, as a shell takes it."""
    pid: int
    start_s: float
    """From exec until it listened."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The back-ends of this run, and where they run."""

    program: Sequence[str]
    """The command `vhostuser` of the build that is measured."""
    bare: Path
    peer: str | None
    """A command with {image} and {socket}; {queues} and {direct} (on or off) if it can do what they say."""
    core: int
    serve_options: Sequence[str] = ()
    bare_engine: str = "pread"
    environment: Mapping[str, str] = field(default_factory=dict)

    def names(self, case: Case) -> list[str]:
        """Who takes part in a test, in the order of a round."""
        peer = self.peer is not None and case.in_file
        peer = peer and (case.queues == 1 or "{queues}" in str(self.peer))
        peer = peer and (case.place != "direct" or "{direct}" in str(self.peer))
        return [OURS] + [PEER] * peer + [BARE] * (case.queues == 1)

    def words(self, name: str, case: Case, image: Path, socket: Path) -> list[str]:
        """The command line of one of them, without what pins it."""
        if name == OURS:
            disk = {"null": f"null:size={GIB}", "memory": f"memory:size={GIB}"}.get(case.place, str(image))
            words = [*self.program, "serve", disk, "--socket", str(socket), "--queues", str(case.queues)]
            words += ["--no-lock"] if case.in_file else []
            return [*words, *(["--cache", "none"] if case.place == "direct" else []), *self.serve_options]
        if name == BARE:
            engine = {"null": "null", "memory": "mapped", "direct": "uring"}.get(case.place, self.bare_engine)
            words = [str(self.bare), "--socket", str(socket), "--engine", engine]
            return [*words, *["--direct"] * (case.place == "direct"), str(GIB) if engine == "null" else str(image)]
        assert self.peer is not None
        values = {"queues": case.queues, "direct": "on" if case.place == "direct" else "off"}
        return [word.format(image=image, socket=socket, **values) for word in shlex.split(self.peer)]

    @contextmanager
    def serve(self, name: str, case: Case, image: Path, directory: Path) -> Iterator[Server]:
        """Run one of them, pinned, until the block ends; entered once it listens. Raises `Failed`."""
        (directory / name).mkdir(exist_ok=True)
        socket = directory / name / "disk.sock"
        socket.unlink(missing_ok=True)
        words = ["taskset", "-c", str(self.core), *self.words(name, case, image, socket)]
        log = directory / f"{name}.log"
        with log.open("wb") as output:
            begun = time.monotonic()
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                env=dict(self.environment) or None,
            )
        try:
            while not listening(socket):
                if process.poll() is not None or time.monotonic() - begun > START_S:
                    said = log.read_text(errors="replace").strip()[-500:]
                    raise Failed(f"{name}: it does not listen: {said or shlex.join(words)}")
                time.sleep(0.001)
            yield Server(name, socket, shlex.join(words), process.pid, time.monotonic() - begun)
            if process.poll() is not None:
                raise Failed(f"{name}: it ended by itself: {log.read_text(errors='replace').strip()[-500:]}")
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def listening(socket: Path) -> bool:
    """Whether somebody listens there; found without connecting, which some servers take for their only client.

    The directory has to be that server's own: one that renames its socket once it listens is known by the old name.
    """
    if not socket.exists():
        return False
    for line in Path("/proc/net/unix").read_text().splitlines():
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[7].startswith(f"{socket.parent}/") and words[3] == LISTENS:
            return True
    return False


def storage_daemon_command(poll_ns: int = DAEMON_POLL_NS) -> tuple[str, str]:
    """The newest storage daemon that is here, as a command with places to fill in, and its version.

    Raises `Unavailable` where there is none.
    """
    for name in reversed([name for name in NAMES if name.startswith("qsd-")]):
        try:
            qemu = storage_daemon(name.removeprefix("qsd-"))
        except (Unavailable, PackagesError):
            continue
        daemon = DAEMON.replace("{poll_ns}", str(poll_ns))
        return f"{shlex.join(qemu.command(PROGRAM))} {daemon}", f"{PROGRAM} {qemu.name}"
    raise Unavailable("no storage daemon is here: run `make interop`, or name a peer with --peer")


def bare_loop() -> Path:
    """Where ``make build/bare`` puts it. Raises `Failed` when it is not there."""
    place = PROJECT / "build" / "bare"
    if not place.exists():
        raise Failed("build/bare is not there: run `make build/bare`")
    return place
