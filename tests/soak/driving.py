"""One disk driven by our own client, with a model of what every block holds. Touches connections and processes."""

from __future__ import annotations

import random
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from tests.guest.backends import Ours

import vhostuser
from vhostuser import Backoff, BlockClient, Discard, Flush, PeerGone, Read, VhostUserError, Write, WriteZeroes

BLOCK: Final = 4096
WORD: Final = struct.Struct("<QQ")
ANYTHING: Final = -1
SLOT: Final = 32
FIRST: Final = 4096
"""The first block of the model: those before it are for a load that is killed."""
BLOCKS: Final = 4096
DROPPED_SPAN: Final = FIRST * BLOCK
SIZE: Final = (FIRST + BLOCKS) * BLOCK
"""Bytes of the disk that must be there whatever its size is."""
PAUSE_S: Final = 0.03
GOING_S: Final = (8.0, 25.0)
BACKOFF: Final = Backoff(first_s=0.02, most_s=0.3, give_up_s=120.0)


def content(number: int, generation: int) -> bytes:
    """What block ``number`` holds after its ``generation``-th write; zeroes for the 0th."""
    return bytes(BLOCK) if generation == 0 else WORD.pack(number, generation) * (BLOCK // WORD.size)


class Wrong(AssertionError):  # noqa: N818  it is what it says
    """A block holds what it should not."""


@dataclass(slots=True)
class Model:
    """For each block, the generations it may be of; several after a write whose end nobody knows."""

    allowed: list[tuple[int, ...]] = field(default_factory=lambda: [(ANYTHING,)] * BLOCKS)
    generation: int = 0
    checked: int = 0

    def wrote(self, first: int, count: int, generation: int, *, certain: bool) -> None:
        """Blocks were written, or perhaps."""
        for number in range(first, first + count):
            self.allowed[number] = (generation,) if certain else (*self.allowed[number], generation)

    def check(self, first: int, data: bytes) -> None:
        """Compare what was read from block ``first`` on, and remember what was not certain."""
        for at in range(0, len(data), BLOCK):
            number, found = first + at // BLOCK, data[at : at + BLOCK]
            if ANYTHING in self.allowed[number]:
                continue
            fits = [generation for generation in self.allowed[number] if content(number, generation) == found]
            if not fits:
                raise Wrong(f"block {number} begins with {WORD.unpack_from(found)}, allowed: {self.allowed[number]}")
            self.allowed[number] = (fits[0],)
            self.checked += 1


class Driver:
    """Connects, works, leaves and comes again until it is told to stop."""

    def __init__(self, name: str, backend: Ours, *, dies: bool, seed: int) -> None:
        self.name = name
        self.backend = backend
        self.counts: Counter[str] = Counter()
        self.model = Model()
        self._dies = dies
        self._drawn = random.Random(seed)

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``; then every block is read once more."""
        while not stop.is_set():
            with self._connected() as client:
                until = time.monotonic() + self._drawn.uniform(*GOING_S)
                while time.monotonic() < until and not stop.is_set():
                    self._batch(client)
                    if self._drawn.random() < 0.01:
                        self._switch(client)
                    stop.wait(PAUSE_S)
                self._read_all(client)
            self.counts["connections"] += 1
            if not self._dies and not stop.is_set():
                self._drop()

    def _connected(self) -> BlockClient:
        """A client; its predecessor's storage, or the back-end itself, may need a moment."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return vhostuser.connect(str(self.backend.socket), queues=2, reconnect=BACKOFF)
            except VhostUserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _batch(self, client: BlockClient) -> None:
        """Some requests at a time, none of them on the same blocks."""
        slots = self._drawn.sample(range(BLOCKS // SLOT), self._drawn.randint(4, 24))
        asked: list[tuple[str, int, int, int, Future[Any]]] = []
        for slot in slots:
            count = self._drawn.randint(1, SLOT)
            first = slot * SLOT + self._drawn.randint(0, SLOT - count)
            kind = self._drawn.choices(("write", "read", "zero", "discard", "flush"), (44, 46, 4, 3, 3))[0]
            self.model.generation += kind == "write"
            generation = {"write": self.model.generation, "zero": 0}.get(kind, ANYTHING)
            future = client.submit(_request(kind, first, count, generation))
            asked.append((kind, first, count, generation, future))
        self._await(asked)

    def _await(self, asked: Sequence[tuple[str, int, int, int, Future[Any]]]) -> None:
        for kind, first, count, generation, future in asked:
            try:
                result = future.result(180)
                certain = True
            except PeerGone:
                self.counts["lost"] += 1
                certain = False
            self.counts["requests"] += 1
            if kind in ("write", "zero", "discard"):
                self.model.wrote(first, count, generation, certain=certain)
            elif kind == "read" and certain:
                self.model.check(first, result)

    def _switch(self, client: BlockClient) -> None:
        try:
            client.set_write_cache(self._drawn.random() < 0.5)
            self.counts["write_cache_switches"] += 1
        except VhostUserError:
            if not self._dies:
                raise

    def _read_all(self, client: BlockClient) -> None:
        chunk = 256
        for first in range(0, BLOCKS, chunk):
            try:
                self.model.check(first, client.read((FIRST + first) * BLOCK, chunk * BLOCK))
            except PeerGone:
                self.counts["lost"] += 1
            self.counts["requests"] += 1

    def _drop(self) -> None:
        """A front-end that dies with requests under way."""
        words = ["bench", str(self.backend.socket), "--pattern", "randrw", "--destroy-data", "--sleeping"]
        words += ["--depth", "16", "--span", str(DROPPED_SPAN), "--time", "30"]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen([*self.backend.program(), *words], stdout=quiet, stderr=quiet)
        try:
            before = self.backend.connections()
            deadline = time.monotonic() + 60
            while self.backend.connections() == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(self._drawn.uniform(0, 0.5))
        finally:
            process.kill()
            process.wait()
        self.counts["dropped_connections"] += 1


def _request(kind: str, first: int, count: int, generation: int) -> Read | Write | WriteZeroes | Discard | Flush:
    offset, length = (FIRST + first) * BLOCK, count * BLOCK
    match kind:
        case "write":
            return Write(offset, b"".join(content(number, generation) for number in range(first, first + count)))
        case "read":
            return Read(offset, length)
        case "zero":
            return WriteZeroes(offset, length)
        case "discard":
            return Discard(offset, length)
    return Flush()
