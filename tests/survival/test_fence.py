"""The fence: no ring of a successor starts before every storage operation of its predecessor has ended.

Storage is a file system of our own here, in which a write stays in flight for as long as the test says, whatever
becomes of the process that made it.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from tests.survival.__main__ import connect_in_time
from tests.survival.model import BLOCK, Model, Violation
from tests.survival.slowfs import HeldWrite, SlowDisk
from tests.survival.supervisor import Supervisor, ours

import vhostuser

LIMIT_S: Final = 30.0
WAITS: Final = "waiting up to .* for it"
ENGINES: Final = [
    ("io_uring", "none"),
    pytest.param("io_uring", "writeback", marks=pytest.mark.kills),
    pytest.param("syscalls", "none", marks=pytest.mark.kills),
    pytest.param("syscalls", "writeback", marks=pytest.mark.kills),
]


class Hold:
    """Holds the first write of ``data``, and no other."""

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data

    def __call__(self, write: HeldWrite) -> bool:
        if write.data != self._data:
            return False
        self._data = None
        return True


def kill_with_a_write_in_flight(
    disk: SlowDisk, place: Path, *options: str, fence: bool = True, another: bool = False
) -> None:
    """Write a block; kill the back-end while storage holds the write; start the next one; write the block again.

    The later write is made by the same front-end, or by ``another`` one. Raises `Violation` when the block does not
    hold what was acknowledged last once storage has let go.
    """
    path, model = place / "disk.sock", Model(1)
    with ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor(ours(disk.path, path, *options), place))
        stack.callback(disk.release)  # a process cannot end while storage holds one of its threads
        supervisor.start()
        client = stack.enter_context(connect_in_time(path))
        old = model.write(0)
        disk.hold = Hold(old.data)
        future = client.submit(vhostuser.Write(0, old.data))
        held = disk.wait_held(1, LIMIT_S)
        supervisor.kill(hurry=True)
        if another:  # the socket is the dying one's as long as it dies
            path = place / "another.sock"
            supervisor.command = ours(disk.path, path, *options)
        successor = supervisor.start()
        if fence:
            successor.wait_output(WAITS, LIMIT_S)
            assert disk.held() == held, "the write has ended: nothing was tried"
            assert not future.done(), "a ring was served with a write of its predecessor in flight"
            disk.release(*held)
        if another:
            client = stack.enter_context(connect_in_time(path))
            model.failed(old)  # there is nobody any more to whom it matters
        else:
            future.result(LIMIT_S)  # the successor has written it, again
            model.written(old)
        new = model.write(0)
        client.write(0, new.data)
        model.written(new)
        disk.release(*held)
        model.check(model.read(0), client.read(0, BLOCK))
        model.check_image(bytes(disk.content[:BLOCK]))


@pytest.mark.parametrize(("engine", "cache"), ENGINES)
def test_a_write_in_flight_at_the_kill_never_lands_after_a_later_one_was_acknowledged(
    engine: str, cache: str, slow_disk: SlowDisk, place: Path
) -> None:
    kill_with_a_write_in_flight(slow_disk, place, "--engine", engine, "--cache", cache)


@pytest.mark.parametrize(("engine", "cache"), ENGINES)
def test_without_the_fence_it_does(engine: str, cache: str, slow_disk: SlowDisk, place: Path) -> None:
    """So that the test above is known to try something: the same without a lock, which is the fence.

    With plain system calls the kernel keeps the process, and with it the socket, until storage lets go: the same
    front-end cannot come too early then, but another one can.
    """
    options = ("--engine", engine, "--cache", cache, "--no-lock")
    with pytest.raises(Violation, match="may hold"):
        kill_with_a_write_in_flight(slow_disk, place, *options, fence=False, another=engine == "syscalls")
