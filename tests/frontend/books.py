"""A back-end's books of what is in flight, slow and obvious (vhost-user: Inflight I/O tracking, split virtqueue).

Written from the specification, for fakes that die in the middle and for those that come after them. Touches the region
and the rings of a `FakeBackend`.
"""

from __future__ import annotations

import mmap
import struct

from tests.frontend.fakes import FakeBackend, Ring

VERSION_AT, SIZE_AT, LAST_AT, USED_AT, ENTRIES_AT = 8, 10, 12, 14, 16


class Books:
    """The part of one ring, which has begun or goes on by the time this is made.

    ``replayed`` are the heads that were in flight when it began, in the order in which they had been taken.
    """

    def __init__(self, backend: FakeBackend, ring: Ring, index: int = 0) -> None:
        assert backend.region is not None
        self._backend, self._ring = backend, ring
        self._region: mmap.mmap = backend.region
        self._start = index * (-(-(16 + 16 * ring.size) // 64) * 64)
        self.replayed: list[int] = []
        used = self._used_index()
        if self._get("<H", VERSION_AT) == 0:
            self._set("<H", SIZE_AT, ring.size)
            self._set("<H", USED_AT, used)
            self._set("<H", VERSION_AT, 1)
        else:
            assert self._get("<H", SIZE_AT) == ring.size
            self._finish_batch(used)
            flying = [head for head in range(ring.size) if self._get("<B", self._entry(head))]
            self.replayed = sorted(flying, key=lambda head: self._get("<Q", self._entry(head) + 8))
            ring.base = (used + len(flying)) & 0xFFFF
        self._counter = max((self._get("<Q", self._entry(head) + 8) for head in range(ring.size)), default=0) + 1

    def take(self) -> int | None:
        """The next head of the ring, entered in the books."""
        head = self._backend.take(self._ring)
        if head is not None:
            assert not self._get("<B", self._entry(head)), "a head that is in flight was made available again"
            self._set("<Q", self._entry(head) + 8, self._counter)
            self._set("<B", self._entry(head), 1)
            self._counter += 1
        return head

    def put(self, head: int, written: int, *, until: str = "cleared") -> None:
        """Give a head back as far as ``until``: ``linked``, ``used`` (the driver sees it), or ``cleared``."""
        entry = self._entry(head)
        self._set("<H", entry + 6, self._get("<H", LAST_AT))
        self._set("<H", LAST_AT, head)
        if until == "linked":
            return
        self._backend.put(self._ring, head, written)
        if until == "used":
            return
        self._set("<B", entry, 0)
        self._set("<H", USED_AT, self._used_index())

    def _finish_batch(self, used: int) -> None:
        head = self._get("<H", LAST_AT)
        for _ in range((used - self._get("<H", USED_AT)) & 0xFFFF):
            self._set("<B", self._entry(head), 0)
            head = self._get("<H", self._entry(head) + 6)
        self._set("<H", USED_AT, used)

    def _used_index(self) -> int:
        return int(struct.unpack_from("<H", self._backend.at(self._ring.used, 4, user=True), 2)[0])

    def _entry(self, head: int) -> int:
        return ENTRIES_AT + 16 * head

    def _get(self, layout: str, at: int) -> int:
        value: int = struct.unpack_from(layout, self._region, self._start + at)[0]
        return value

    def _set(self, layout: str, at: int, value: int) -> None:
        struct.pack_into(layout, self._region, self._start + at, value)
