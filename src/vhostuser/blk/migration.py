"""A disk moves from one back-end to another while it is used, as a virtual machine's does. Touches both connections.

What is done is what a hypervisor does that migrates a machine, but that there is no machine: the rings, the buffers and
the requests in them stay where they are, in the memory of this process. The memory is copied all the same, page by page
as the back-end logs them, so that a page which it forgets is noticed here and not by a guest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vhostuser.blk.fitness import check_as_before, limits_of
from vhostuser.blk.settings import switched
from vhostuser.blk.shadow import Shadow
from vhostuser.errors import (
    BackendRefused,
    ConfigRefused,
    MigrationFailed,
    OperatorError,
    PeerGone,
    SetupError,
    VhostUserError,
)
from vhostuser.frontend.dialogue import again
from vhostuser.frontend.memory import PAGE
from vhostuser.frontend.reach import name_of_endpoint
from vhostuser.protocol import ProtocolFeature
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig

if TYPE_CHECKING:
    from vhostuser.blk.link import DiskLink
    from vhostuser.frontend.client import HostDevice
    from vhostuser.frontend.inflight import HostInflight
    from vhostuser.frontend.reach import Endpoint

SHOWN: Final = 4
"""So many pages are named in the text of a failure; the error has them all."""

MAX_ROUNDS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Migration:
    """What it took to move a disk from one back-end to another."""

    source: str
    destination: str
    rounds: tuple[int, ...]
    """Pages copied in each round: first everything, then what was logged meanwhile, at last with the rings stopped."""
    copied_bytes: int
    """What these pages are, of 4096 bytes each."""
    elapsed_s: float
    downtime_s: float
    """From the first message that stopped the rings until they ran again."""
    outstanding: int
    """Requests that were not answered when the rings were stopped."""
    carried: int
    """Those of them that the source left in the in-flight region, for the destination to answer."""
    state_bytes: int | None
    """The state of the device; None where not both back-ends can move one."""
    differing: tuple[int, ...]
    """Guest addresses of pages that were written and not logged."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How to move a disk: see `BlockClient.migrate`."""

    rounds: int = 4
    round_s: float = 0.02
    swap_log: bool = False
    leave: bool = True
    strict: bool = True

    def check(self) -> None:
        """Raise `SetupError` for numbers that make no sense."""
        if not 0 <= self.rounds <= MAX_ROUNDS:
            raise SetupError(f"there are 0 to {MAX_ROUNDS} rounds, not {self.rounds}")
        if not 0 <= self.round_s <= 3600:
            raise SetupError(f"a round takes 0 to 3600 s, not {self.round_s}")


class Move:
    """One attempt. `prepare`, `pause`, until `drained` if it `drains`, `switch`; and `end` in any case.

    `switch` is for who calls the link's `step`, everything else for any thread, one at a time.
    """

    def __init__(self, link: DiskLink, destination: Endpoint, manner: Manner, *, closing: threading.Event) -> None:
        """``closing`` ends the rounds when it is set."""
        manner.check()
        if link.device is None:
            raise PeerGone("there is no connection yet")
        self.destination: Final = destination
        self._link: Final = link
        self._source: Final = link.device
        self._from: Final = link.name
        self._to: Final = name_of_endpoint(destination)
        self._manner: Final = manner
        self._closing: Final = closing
        self._target: HostDevice | None = None
        self._adopted: HostDevice | None = None
        self._shadow: Shadow | None = None
        self._rounds: list[int] = []
        self._begun = self._paused = time.monotonic()

    def prepare(self) -> None:
        """Connect to the destination, and copy the memory in rounds while the requests go on. Blocks."""
        with self._staying():
            self._target = target = self._link.reach(self.destination)
            target.watch_config(self._link.config_size, self._hear)
            self._check_limits(target)
        with self._at_source():
            self._source.start_log()
        self._shadow = shadow = Shadow(self._link.memory)
        for lane in self._link.lanes:
            lane.follow(shadow)
        with self._lanes_held():
            self._rounds.append(shadow.fill())
        for _ in range(self._manner.rounds):
            if self._closing.wait(self._manner.round_s):
                raise SetupError("the client is closed")
            with self._at_source():
                dirty = self._source.swap_log() if self._manner.swap_log else self._source.read_log()
            with self._lanes_held():
                self._rounds.append(shadow.take(dirty))

    @property
    def drains(self) -> bool:
        """Whether everything has to be answered before the rings are stopped: the source may leave requests, and they
        are not to be left, or the destination has no use for them."""
        may_leave = ProtocolFeature.GET_VRING_BASE_INFLIGHT in self._source.protocol_features
        return may_leave and not self._leaves

    @property
    def _leaves(self) -> bool:
        return (
            self._manner.leave
            and self._target is not None
            and ProtocolFeature.GET_VRING_BASE_INFLIGHT in self._source.protocol_features
            and ProtocolFeature.INFLIGHT_SHMFD in self._target.protocol_features
        )

    def pause(self) -> None:
        """From now on nothing is put into the rings: what is submitted waits."""
        self._paused = time.monotonic()
        for lane in self._link.lanes:
            lane.pause()

    @property
    def drained(self) -> bool:
        """Whether every request in the rings is answered, or the link is lost."""
        return self._lost or all(not lane.outstanding for lane in self._link.lanes)

    @property
    def _lost(self) -> bool:
        return not self._link.connected or self._link.device is not self._source

    def switch(self) -> Migration:
        """Stop the rings at the source, and start them at the destination. Blocks.

        Raises `MigrationFailed` when the rings run at the source again, and what broke the source if they cannot.
        """
        link, source, target, shadow = self._link, self._source, self._target, self._shadow
        if target is None or shadow is None:
            raise SetupError("the migration was not prepared")
        if self._lost:
            raise self._source_gone()
        outstanding = sum(lane.outstanding for lane in link.lanes)
        with self._at_source():
            carried = source.stop(leave=self._leaves)
        region = source.take_inflight()
        state: bytes | None = None
        try:
            self._rounds.append(shadow.take(source.read_log()))
            differing = shadow.differing()
            if differing and self._manner.strict:
                raise self._not_logged(differing)
            with self._staying():
                state = self._move_state(target)
                self._start(target, region)
        except MigrationFailed as failure:
            self._go_back(target, region, failure)
            raise
        downtime_s = time.monotonic() - self._paused
        self._target, self._adopted = None, target
        link.adopt(target, self.destination)
        with suppress(VhostUserError):  # a connection that is lost already is noticed by the next step
            link.hear(b"", target.read_config(0, link.config_size))
        return Migration(
            source=self._from,
            destination=self._to,
            rounds=tuple(self._rounds),
            copied_bytes=sum(self._rounds) * PAGE,
            elapsed_s=time.monotonic() - self._begun,
            downtime_s=downtime_s,
            outstanding=outstanding,
            carried=carried,
            state_bytes=None if state is None else len(state),
            differing=differing,
        )

    def _move_state(self, target: HostDevice) -> bytes | None:
        """What the destination has to know that is not in memory: the device's state, and how the cache is switched."""
        target.accept_features()  # fields of the configuration depend on them
        state = None
        if ProtocolFeature.DEVICE_STATE in self._source.protocol_features & target.protocol_features:
            state = self._source.save_state()
            target.load_state(state)
        link = self._link
        if link.features & BlkFeature.CONFIG_WCE:
            wanted = bool(link.config.writeback)
            told = VirtioBlkConfig.unpack(target.read_config(0, link.config_size))
            if bool(told.writeback) is not wanted and bool(switched(target, enabled=wanted)) is not wanted:
                raise ConfigRefused(f"its write cache cannot be switched {'on' if wanted else 'off'}")
        return state

    def _start(self, target: HostDevice, region: HostInflight | None) -> None:
        self._check_limits(target)
        target.start(self._link.memory, [lane.queue for lane in self._link.lanes], inflight=region)

    def _go_back(self, target: HostDevice, region: HostInflight | None, failure: MigrationFailed) -> None:
        """The rings run at the source again."""
        if region is not None:
            target.take_inflight()  # what it has taken over is kept here
        target.close(wait=False)
        source = self._source
        try:
            source.stop_log()
            source.start(self._link.memory, [lane.queue for lane in self._link.lanes], inflight=region)
        except VhostUserError as error:
            gone = PeerGone(f"{failure} And it did not go on at {self._from}: {error}")
            source.dialogue.fail(gone)
            raise gone from failure

    def end(self) -> None:
        """Let go of what is not needed any more; unless the disk was moved the source goes on as before. Idempotent."""
        for lane in self._link.lanes:
            lane.follow(None)
        if self._target is not None:
            self._target.close(wait=False)
            self._target = None
        if self._adopted is None:
            if self._source.logging:
                with suppress(VhostUserError):
                    self._source.stop_log()
            for lane in self._link.lanes:
                lane.restart()
        if self._shadow is not None:
            self._shadow.close()
            self._shadow = None

    def _check_limits(self, target: HostDevice) -> None:
        """Everything that was made for the source has to be good for the destination."""
        link = self._link
        config = VirtioBlkConfig.unpack(target.read_config(0, link.config_size))
        check_as_before(target, link.features, link.limits, limits_of(target, config, link.options))

    def _hear(self, old: bytes, new: bytes) -> None:
        """The destination has another configuration: of interest once it is where the disk is."""
        if self._adopted is not None and self._link.device is self._adopted:
            self._link.hear(old, new)

    @contextmanager
    def _lanes_held(self) -> Iterator[None]:
        """What the driver writes it writes before or afterwards."""
        with ExitStack() as held:
            for lane in self._link.lanes:
                held.enter_context(lane.held())
            yield

    @contextmanager
    def _staying(self) -> Iterator[None]:
        """Whatever the destination does ends in `MigrationFailed`."""
        try:
            yield
        except MigrationFailed:
            raise
        except OperatorError as error:
            raise MigrationFailed(self._to, _not_moved(error.cause), _advice(error.advice)) from error
        except VhostUserError as error:
            raise MigrationFailed(self._to, _not_moved(str(error)), "See the log of the destination") from error

    @contextmanager
    def _at_source(self) -> Iterator[None]:
        """A source that cannot log is told as such; what breaks the connection is told as it is."""
        try:
            yield
        except OperatorError as error:
            raise MigrationFailed(self._from, _not_moved(error.cause), _advice(error.advice)) from error
        except BackendRefused as error:
            raise MigrationFailed(self._from, _not_moved(str(error)), "See the log of the source") from error

    def _not_logged(self, pages: tuple[int, ...]) -> MigrationFailed:
        named = ", ".join(f"{page:#x}" for page in pages[:SHOWN])
        more = f" and {len(pages) - SHOWN} more" if len(pages) > SHOWN else ""
        what = "page was" if len(pages) == 1 else "pages were"
        cause = f"{len(pages)} {what} written and not logged: guest address {named}{more}"
        return MigrationFailed(self._from, _not_moved(cause), "Report it to the makers of the source", pages=pages)

    def _source_gone(self) -> VhostUserError:
        return again(self._link.error or self._link.away or PeerGone("the source of the migration has gone"))


def _not_moved(cause: str) -> str:
    return f"the disk was not moved: {cause.rstrip('.')}"


def _advice(advice: str) -> str:
    """What is said of a back-end that comes again is not for one to move to."""
    if advice.startswith("Start the one that was there"):
        return "Start the destination with what the source has"
    return advice
