"""Fixtures of the guest tests: QEMU versions, what they boot, back-ends and guests that end with the test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from tests.guest.backends import Backend, Export, NotSupportedError, Ours, StorageDaemon
from tests.guest.images import blank
from tests.guest.machines import Disk, Guest, Setup
from tests.guest.prepare import COVERED, OFFERS, Machine, Qemu, machine_ready, present
from tests.guest.prepare import machine as prepared_machine

ADVICE: Final = "no guest can be booted here: run `make packages`"
VERSIONS_VARIABLE: Final = (
    "VHOSTUSER_QEMU"  # versions (or `sid`) to test with, separated by commas, instead of the covered ones
)
BACKEND_VARIABLE: Final = "VHOSTUSER_GUEST_BACKEND"  # "storage-daemon" checks the tests against another back-end
KEEP_VARIABLE: Final = "VHOSTUSER_KEEP"  # keep images and logs

type_of_backend: Final = {"ours": Ours, "storage-daemon": StorageDaemon}

Serve = Callable[..., Backend]
Boot = Callable[..., Guest]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of guests with each QEMU: every one that is here for the smoke test, the covered ones otherwise."""
    if "qemu" not in metafunc.fixturenames:
        return
    chosen = os.environ.get(VERSIONS_VARIABLE)
    wanted = [_version(name) for name in chosen.split(",")] if chosen else list(COVERED)
    everything = metafunc.definition.get_closest_marker("guest") is None
    found = [qemu for qemu in present() if machine_ready() and (everything or qemu.name in wanted)]
    if found:
        metafunc.parametrize("qemu", found, ids=[f"qemu-{qemu.name}" for qemu in found])
    else:
        metafunc.parametrize("qemu", [pytest.param(None, marks=pytest.mark.skip(ADVICE))], ids=["no-qemu"])


def _version(name: str) -> str:
    """The version of a QEMU that goes by the name under which it is fetched, too: ``sid`` is 11.1 today."""
    return OFFERS[name].fetch().name if name in OFFERS and OFFERS[name].ready() else name


@pytest.fixture(scope="session")
def machine() -> Machine:
    """Kernel and initramfs."""
    if not machine_ready():
        pytest.skip(ADVICE)
    return prepared_machine()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name (sockets live in it), for one test."""
    directory = Path(tempfile.mkdtemp(prefix="vhu-"))
    yield directory
    if not os.environ.get(KEEP_VARIABLE):
        shutil.rmtree(directory)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What ends with the test, in the reverse order of its start."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(place: Path, stack: ExitStack) -> Serve:
    """Serve an image: ``serve(image, queues=4, ...)`` with the fields of `Export`; ends with the test."""

    def start(image: Path | str, **export: object) -> Backend:
        kind = type_of_backend[os.environ.get(BACKEND_VARIABLE, "ours")]
        try:
            return stack.enter_context(kind(image, place, Export(**export)))  # type: ignore[arg-type]
        except NotSupportedError as error:
            pytest.skip(str(error))

    return start


@pytest.fixture
def boot(qemu: Qemu, machine: Machine, place: Path, stack: ExitStack) -> Boot:
    """Boot a guest with disks: ``boot(disk, ..., cpus=2)`` with the fields of `Setup`; killed with the test's end."""

    def start(*disks: Disk, **setup: object) -> Guest:
        settings = Setup(**setup)  # type: ignore[arg-type]
        guest = stack.enter_context(Guest(qemu, machine, place, disks, settings))
        return guest if settings.firmware_only else guest.wait_ready()

    return start


@pytest.fixture
def image(place: Path) -> Path:
    """A sparse image of 64 MiB."""
    return blank(place / "disk.img", 64 << 20)
