"""What serves a guest's disks: our own back-end, and QEMU's storage daemon to check the tests against another.

Touches: processes and the files they serve.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .processes import Child, ChildError, Deadline, readable
from .streams import Listener, Qmp

START_S: Final = 30.0
STOP_S: Final = 30.0


class NotSupportedError(Exception):
    """This back-end has no such option; tests that need it are skipped with it."""


@dataclass(frozen=True, slots=True)
class Export:
    """How an image is to be served; each back-end says it in its own options."""

    queues: int | None = None  # None: what the back-end offers by itself
    read_only: bool = False
    serial: str | None = None
    block_size: int | None = None
    physical_block_size: int | None = None
    cache: str | None = None
    seg_max: int | None = None
    engine: str | None = None
    inject: str | None = None
    on_enospc: str | None = None
    incoming: bool = False
    lock_timeout: float | None = None
    on_error: str | None = None


class Backend(ABC):
    """A back-end process that serves one image; killed when the block ends."""

    _numbers = itertools.count()

    def __init__(self, image: Path | str, directory: Path, export: Export) -> None:
        """Start serving and wait until the socket can be connected to."""
        number = next(self._numbers)
        self.image = image
        self.export = export
        self.socket = directory / f"b{number}.sock"
        self.log = directory / f"backend{number}.log"
        self._directory = directory
        self.process = self.start()

    @abstractmethod
    def start(self) -> Child:
        """Start the process and wait until it is ready; also after `kill`, with the same socket."""

    @abstractmethod
    def resize(self, size: int) -> None:
        """Give the disk a new size in bytes."""

    def restart(self) -> None:
        """Start again after `kill` or `stop`, on the same socket."""
        self.close()
        self.process = self.start()

    def kill(self) -> None:
        """Kill it where it stands."""
        self.process.signal(signal.SIGKILL)
        self.process.wait(STOP_S)

    def stop(self) -> None:
        """Ask it to end; raises `ChildError` when it does not end well."""
        self.process.signal(signal.SIGTERM)
        status = self.process.wait(STOP_S)
        if status:
            raise ChildError(f"{self.process.name} ended with {status}: {self.process.tail()}")

    def close(self) -> None:
        """Kill it when it still runs, and forget it."""
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.process.alive:
                self.stop()
        finally:
            self.close()


class Ours(Backend):
    """``vhostuser serve``, run as a user runs it."""

    def program(self) -> list[str]:
        """The start of its command line."""
        return program()

    def connections(self) -> int:
        """How many front-ends have connected since its first start, as its log has them."""
        return self.log.read_bytes().count(b"a front-end connected")

    def start(self) -> Child:
        """Start it and wait for its ready notice."""
        return self._start()

    def upgrade(self) -> None:
        """Start a successor that takes the sockets over; raises `ChildError` unless the running one ends well."""
        old, self.process = self.process, self._start("--upgrade")
        try:
            status = old.wait(STOP_S)
            if status:
                raise ChildError(f"{old.name} ended with {status} when it was succeeded: {old.tail()}")
        finally:
            old.close()

    def _start(self, *more: str) -> Child:
        notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        place = self.socket.with_suffix(".notify")
        place.unlink(missing_ok=True)
        notices.bind(str(place))
        environment = {"NOTIFY_SOCKET": str(place), "PYTHONPATH": _search_path()}
        words = ["serve", str(self.image), "--socket", str(self.socket), *self._options(), *more]
        command = [*self.program(), *words]
        child = Child("vhostuser serve", command, self.log, environment)
        deadline = Deadline(START_S)
        try:
            with notices:
                while True:
                    ready = readable([notices, child], deadline.left_s)
                    if notices not in ready:
                        how = "ended at its start" if ready else "did not get ready in time"
                        raise ChildError(f"vhostuser serve {how}: {child.tail()}")
                    if b"READY=1" in notices.recv(4096).split(b"\n"):
                        return child
        except BaseException:
            child.close()
            raise
        finally:
            place.unlink(missing_ok=True)

    def _options(self) -> list[str]:
        export = self.export
        words = ["--read-only"] if export.read_only else []
        words += ["--incoming"] if export.incoming else []
        values = {
            "--queues": export.queues,
            "--serial": export.serial,
            "--block-size": export.block_size,
            "--physical-block-size": export.physical_block_size,
            "--cache": export.cache,
            "--seg-max": export.seg_max,
            "--engine": export.engine,
            "--inject": export.inject,
            "--on-enospc": export.on_enospc,
            "--lock-timeout": export.lock_timeout,
            "--on-error": export.on_error,
        }
        return words + [word for name, value in values.items() if value is not None for word in (name, str(value))]

    def resize(self, size: int) -> None:
        """Through the command, as an operator would."""
        self._ask("resize", str(self.socket), str(size))

    def statistics(self) -> dict[str, object]:
        """What ``vhostuser stats --json`` says."""
        found = json.loads(self._ask("stats", str(self.socket), "--json"))
        assert isinstance(found, dict)
        return found

    def in_flight(self) -> list[dict[str, object]]:
        """The requests that ``vhostuser stats --inflight --json`` lists."""
        found = json.loads(self._ask("stats", str(self.socket), "--inflight", "--json"))["requests"]
        assert isinstance(found, list)
        return found

    def retry(self) -> str:
        """``vhostuser retry``, and what it says."""
        return self._ask("retry", str(self.socket))

    def information(self) -> dict[str, object]:
        """What ``disk.info`` says over the control socket."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(f"{self.socket}.ctl")
            control.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "disk.info"}).encode() + b"\n")
            with control.makefile("rb") as answers:
                found = json.loads(answers.readline())["result"]
        assert isinstance(found, dict)
        return found

    def stop(self) -> None:
        """Also refuses a back-end that wrote a traceback or a panic into its log."""
        super().stop()
        said = self.log.read_text(errors="replace")
        for trouble in ("Traceback (most recent call last)", "panicked at"):
            if trouble in said:
                raise ChildError(f"vhostuser serve wrote a {trouble}: {said[-4000:]}")

    def _ask(self, *words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": _search_path()}
        done = subprocess.run([*program(), *words], capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise ChildError(f"vhostuser {' '.join(words)} ended with {done.returncode}: {done.stderr}")
        return done.stdout


class Forgetful(Ours):
    """``vhostuser serve`` without in-flight tracking: what it had taken when it is killed, nobody knows."""

    def program(self) -> list[str]:
        """Python with the feature taken out of the offer before the command runs."""
        return _spoiled(
            "from vhostuser.blk import BlockDevice",
            "from vhostuser.protocol import ProtocolFeature",
            "offer = BlockDevice.protocol_features",
            "without = lambda self: offer.fget(self) & ~ProtocolFeature.INFLIGHT_SHMFD",
            "BlockDevice.protocol_features = property(without)",
        )


class Unlogged(Ours):
    """``vhostuser serve`` that takes every dirty log and writes nothing into it."""

    def program(self) -> list[str]:
        """Python with the log dropped on its way to the rings."""
        return _spoiled(
            "from vhostuser.backend.vrings import Vrings",
            "Vrings.set_log = lambda self, log: None",
        )


def _spoiled(*lines: str) -> list[str]:
    """Python that runs ``lines`` before the command."""
    return [sys.executable, "-c", "\n".join([*lines, "from vhostuser.cli.main import main", "main()"])]


class StorageDaemon(Backend):
    """``qemu-storage-daemon``: an independent vhost-user-blk back-end that the tests themselves are checked with."""

    @staticmethod
    def available() -> bool:
        """Whether it is installed on this machine."""
        return shutil.which("qemu-storage-daemon") is not None

    def program(self) -> list[str]:
        """The start of its command line."""
        return ["qemu-storage-daemon"]

    def start(self) -> Child:
        """Start it and wait until its main loop answers: then the export exists."""
        export = self.export
        for name in (
            "serial",
            "physical_block_size",
            "seg_max",
            "engine",
            "inject",
            "on_enospc",
            "lock_timeout",
            "on_error",
        ):
            if getattr(export, name) is not None:
                raise NotSupportedError(f"qemu-storage-daemon has no option for {name}")
        self.socket.unlink(missing_ok=True)
        listener = Listener(self.socket.with_suffix(".qmp"))
        file = f"driver=file,node-name=f,filename={self.image},discard=unmap"
        if export.read_only:
            file += ",read-only=on"
        words = ["--chardev", f"socket,id=q,path={listener.path}", "--monitor", "q", "--blockdev", file]
        details = f"writable={'off' if export.read_only else 'on'},num-queues={export.queues or 1}"
        if export.block_size is not None:
            details += f",logical-block-size={export.block_size}"
        words += ["--export", f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={self.socket},{details}"]
        child = Child("qemu-storage-daemon", [*self.program(), *words], self.log)
        try:
            self._qmp = Qmp(listener.accept(child, START_S))
        except BaseException:
            child.close()
            listener.close()
            raise
        return child

    def close(self) -> None:
        """Also closes its monitor."""
        super().close()
        self._qmp.close()

    def resize(self, size: int) -> None:
        """Through its monitor."""
        self._qmp.command("block_resize", **{"node-name": "f"}, size=size)


def program() -> list[str]:
    """The command line of ``vhostuser``, from the same environment as the tests."""
    return [sys.executable, "-m", "vhostuser.cli.main"]


def _search_path() -> str:
    found = importlib.util.find_spec("vhostuser")
    if found is None or not found.submodule_search_locations:
        raise ChildError("the package vhostuser cannot be imported; build it first")
    own = str(Path(next(iter(found.submodule_search_locations))).parent)
    return os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
