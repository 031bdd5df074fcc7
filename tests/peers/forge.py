"""Makes processes of our back-end by the hundred: one process imports the package, and forks for each of them.

As a program it is that process. It reads ``SOCKET IMAGE`` lines and answers each with the number of a process that
listens there, or "failed"; IMAGE is a path or ``memory:size=SIZE``. When its input ends it ends, and so do those that
it made. Touches processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.guest.packages import PROJECT
from tests.guest.processes import Deadline

from vhostuser.backend import Server
from vhostuser.blk import BlockDevice
from vhostuser.disks import open_disk
from vhostuser.errors import VhostUserError
from vhostuser.transport import listen

START_S: Final = 10.0


class Forge:
    """The program below, used from a test."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.peers.forge"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=PROJECT
        )

    def make(self, path: Path, image: str) -> int:
        """The number of a new process that serves ``image`` at ``path``; it listens by now.

        Tries again as a service manager does: the lock on an image outlives a killed process until the kernel has
        ended its last request.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = Deadline(START_S)
        while True:
            self._process.stdin.write(f"{path} {image}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            if answer.strip().isdecimal():
                return int(answer)
            assert deadline.left_s, f"no back-end at {path}: {answer!r}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def serve(path: str, image: str, ready: int) -> None:
    """Serve until killed."""
    with open_disk(image) as disk:
        device = BlockDevice(disk, num_queues=2, num_workers=2)
        server = Server(device, listen(path))
        os.write(ready, b"\n")
        server.run()


def main() -> None:
    """See above."""
    made: list[int] = []
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        path, image = line.split()
        readable, ready = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                serve(path, image, ready)
            except (VhostUserError, OSError) as error:
                print(f"{path}: {error}", file=sys.stderr)
            finally:
                os._exit(1)
        os.close(ready)
        listening = os.read(readable, 1)
        os.close(readable)
        made.append(process)
        print(process if listening else "failed", flush=True)
    for process in made:
        if _is_ours(process):
            os.kill(process, signal.SIGKILL)


def _is_ours(process: int) -> bool:
    try:
        return f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


if __name__ == "__main__":
    main()
