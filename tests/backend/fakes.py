"""A queue set that records what it is asked, and a device around it. Touches one eventfd."""

from __future__ import annotations

import os
from typing import Final

from vhostuser._native import GuestMemory
from vhostuser.backend import Device
from vhostuser.errors import ConfigRefused, DrainTimeout, SetupError
from vhostuser.fds import Fd
from vhostuser.protocol import VringAddr

Call = tuple[object, ...]

NUM_QUEUES: Final = 4


class FakeEvent:
    """What a worker wants its session to know."""

    def __init__(self, kind: str, index: int | None, reason: str) -> None:
        self.kind = kind
        self.index = index
        self.reason = reason


class FakeQueues:
    """Obeys the rules of `vhostuser._native.QueueSet`, serves nothing, and writes down every call in ``calls``."""

    def __init__(self, num_queues: int = NUM_QUEUES) -> None:
        self._num_queues = num_queues
        self._events = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._pending: list[FakeEvent] = []
        self.calls: list[Call] = []
        self.started: dict[int, int] = {}
        self.inflight: dict[int, object] = {}
        self.log: tuple[object, bool] = (None, False)
        self.log_used: dict[int, int | None] = {}
        self.refuse_start: str | None = None
        self.stuck = False
        self.looks = 0
        self.counters: dict[str, int] = {}
        self.memory = GuestMemory()

    @property
    def num_queues(self) -> int:
        return self._num_queues

    def set_memory(self, memory: GuestMemory, timeout_s: float = 30.0) -> None:
        if self.stuck:
            raise DrainTimeout("a write is still under way")
        self.calls.append(("set_memory", len(memory.regions)))
        self.memory = memory

    def start(
        self, index: int, *, size: int, desc: int, used: int, avail: int, base: int, features: int, enabled: bool,
        kick: int | None = None, call: int | None = None, err: int | None = None, inflight: object = None,
    ) -> None:  # fmt: skip
        if index in self.started:
            raise SetupError(f"ring {index} is started already")
        if self.refuse_start is not None:
            raise SetupError(self.refuse_start)
        for fd in (kick, call, err):
            if fd is not None:
                os.fstat(fd)
        self.started[index] = base
        descriptors = "".join(
            letter if fd is not None else "-" for letter, fd in (("k", kick), ("c", call), ("e", err))
        )
        self.calls.append(("start", index, size, base, features, enabled, descriptors))
        self.inflight[index] = inflight

    def stop(
        self, index: int, timeout_s: float = 30.0, *, leave: bool = False, kept_timeout_s: float | None = None
    ) -> int:
        if self.stuck:
            raise DrainTimeout("a write is still under way")
        self.calls.append(("stop", index))
        try:
            return self.started.pop(index) + 7
        except KeyError:
            raise SetupError(f"ring {index} was not started") from None

    def set_log(self, log: object, *, data: bool, notify: int | None = None, timeout_s: float = 30.0) -> None:
        if self.log != (log, data):
            self.calls.append(("set_log", log is not None, data))
        self.log = (log, data)

    def set_log_used(self, index: int, guest_addr: int | None) -> None:
        if self.log_used.get(index) != guest_addr:
            self.calls.append(("set_log_used", index, guest_addr))
        self.log_used[index] = guest_addr

    def enable(self, index: int, enabled: bool) -> None:
        self.calls.append(("enable", index, enabled))
        if index not in self.started:
            raise SetupError(f"ring {index} was not started")

    def set_kick(self, index: int, fd: int | None) -> None:
        self.calls.append(("set_kick", index, fd is not None))

    def set_call(self, index: int, fd: int | None) -> None:
        self.calls.append(("set_call", index, fd is not None))

    def set_err(self, index: int, fd: int | None) -> None:
        self.calls.append(("set_err", index, fd is not None))

    @property
    def events_fd(self) -> int:
        return self._events.fileno()

    def post(self, kind: str, index: int | None, reason: str) -> None:
        """Let something happen."""
        self._pending.append(FakeEvent(kind, index, reason))
        os.eventfd_write(self._events.fileno(), 1)

    def take_events(self) -> list[FakeEvent]:
        if self._pending:
            os.eventfd_read(self._events.fileno())
        taken, self._pending = self._pending, []
        return taken

    def stats(self) -> list[dict[str, int]]:
        self.looks += 1
        return [self.counters, *({} for _ in range(self._num_queues - 1))]

    def close(self, timeout_s: float = 30.0) -> None:
        self.calls.append(("close",))
        self._events.close()


class FakeDevice(Device):
    """A device with 16 bytes of configuration, of which the driver may write the last."""

    device_id = 42
    has_config = True
    FEATURES: Final = 1 << 3 | 1 << 32

    def __init__(self, num_queues: int = NUM_QUEUES) -> None:
        super().__init__()
        self.fake = FakeQueues(num_queues)
        self.config = bytearray(range(16))
        self.told: list[Call] = []
        self.max_queue_size = 1024

    @property
    def name(self) -> str:
        return "fake"

    @property
    def features(self) -> int:
        return self.FEATURES

    @property
    def queues(self) -> FakeQueues:  # type: ignore[override]  a protocol class cannot be asked at run time
        return self.fake

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(self.config[offset : offset + size])

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        if (offset, len(data)) != (15, 1):
            raise ConfigRefused("a driver may write byte 15")
        self.config[15] = data[0]

    def features_acked(self, features: int) -> None:
        self.told.append(("features", features))

    def status_changed(self, status: int) -> None:
        self.told.append(("status", status))

    def reset(self) -> None:
        self.told.append(("reset",))


def addr_of(index: int, place: int = 0x1000) -> VringAddr:
    """Where a ring of the tests lies."""
    return VringAddr(index, 0, place, place + 0x2000, place + 0x1000, 0)
