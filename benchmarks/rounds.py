"""Running the tests: the servers of one test side by side, and rounds in which each has its turn. Touches: images,
processes."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.cases import GIB, QEMU_IMG_DEPTHS, SPAN, Case
from benchmarks.clients import Client, QemuImg
from benchmarks.results import Outcome, Sample
from benchmarks.servers import Offer

PIECE: Final = 1 << 20
CALIBRATING: Final = 4000
QEMU_IMG_CASE: Final = Case("tmpfs", "read", 1)


@dataclass(frozen=True, slots=True)
class Images:
    """The files that are served, and where sockets are made."""

    in_memory: Path
    in_file_system: Path
    directory: Path

    def of(self, case: Case) -> Path:
        """The image of a test; a memory disk is compared with a file in memory that is mapped."""
        return self.in_file_system if case.place in ("ext4", "direct") else self.in_memory


def fill(image: Path) -> None:
    """Make an image of 1 GiB that is data everywhere, and has it written back."""
    piece = os.urandom(PIECE)
    with image.open("wb") as file:
        for _ in range(GIB // PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def cache(image: Path, case: Case) -> None:
    """What loads reach is in the page cache, in pieces such as a guest with this load would have brought there.

    The kernel keeps what is read at once together. Some file systems look at all of such a piece for every write to a
    page of it: ext4 of Linux 6.18 takes ten microseconds for a piece of 2 MiB, whoever writes.
    """
    random = case.pattern.startswith("rand") and not case.large
    size = case.block_size if random else PIECE
    with image.open("rb", buffering=0) as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if random:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        buffer = bytearray(size)
        for _ in range(SPAN // size):
            file.readinto(buffer)


def settle(image: Path, *, cache: bool) -> None:
    """Every run begins alike: nothing is left to write back, and what loads reach is in the page cache if ``cache``."""
    with image.open("rb", buffering=0) as file:
        os.fdatasync(file.fileno())
        buffer = bytearray(PIECE)
        for _ in range(SPAN // PIECE if cache else 0):
            file.readinto(buffer)


def run_case(case: Case, offer: Offer, client: Client, images: Images, *, rounds: int, seconds: float) -> Outcome:
    """One test: all servers are started, each has a short turn that does not count, then they take turns in rounds.

    Raises `Failed` when a request failed.
    """
    image = images.of(case)
    names = offer.names(case)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    if case.place == "ext4":
        cache(image, case)
    with ExitStack() as stack:
        servers = [stack.enter_context(offer.serve(name, case, image, images.directory)) for name in names]
        for number in range(rounds + 1):
            for server in servers:
                if case.in_file:
                    settle(image, cache=case.place != "direct")
                elif not number and case.place == "memory":
                    client.fill(server)
                sample = client.run(server, case, seconds if number else min(seconds, 0.2))
                if number:
                    samples[server.name].append(sample)
        commands = {server.name: server.command for server in servers}
        commands["client"] = shlex.join(client.words("SOCKET", case, seconds))
    return Outcome(case.name, case.title, samples, commands, os.getloadavg()[0])


def run_qemu_img(depth: int, offer: Offer, client: QemuImg, images: Images, *, rounds: int, seconds: float) -> Outcome:
    """The same with `qemu-img bench`, which takes a number of requests: all servers get the same. Raises `Failed`."""
    assert depth in QEMU_IMG_DEPTHS
    names = offer.names(QEMU_IMG_CASE)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(offer.serve(name, QEMU_IMG_CASE, images.in_memory, images.directory)) for name in names
        ]
        rates = [client.run(server, depth, CALIBRATING).per_s for server in servers]
        count = max(CALIBRATING, int(max(rates) * seconds))
        for _ in range(rounds):
            for server in servers:
                samples[server.name].append(client.run(server, depth, count))
        commands = {server.name: server.command for server in servers}
        commands["client"] = shlex.join(client.words("SOCKET", depth, count))
    title = f"qemu-img bench: 4 KiB sequential read, {depth} at a time"
    return Outcome(f"qemu-img/read-4k-d{depth}", title, samples, commands, os.getloadavg()[0])
