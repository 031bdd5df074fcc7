"""The rings of one connection: what was told about them, and what of it is carried out. Touches the native queues."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from vhostuser._native import GuestMemory
from vhostuser.backend.rings import RingEvent, RingPlan, RingState
from vhostuser.errors import DrainTimeout, OperatorError, SetupError
from vhostuser.protocol import F_LOG_ALL, F_PROTOCOL_FEATURES

if TYPE_CHECKING:
    from vhostuser._native import DirtyLog, InflightRegion
    from vhostuser.backend.device import Device
    from vhostuser.fds import Fd
    from vhostuser.protocol import VringAddr

log = logging.getLogger(__name__)

SPLIT_BASE_MASK = 0xFFFF
"""The bits of SET_VRING_BASE that a split ring uses."""


class Vrings:
    """Every ring of one device during one connection.

    A ring runs natively from the moment it is kicked and its description is complete. Descriptors are duplicated;
    the caller keeps its own. Methods raise `SetupError`, having changed nothing, when what is asked makes no sense;
    those that start a ring raise `OperatorError`, too, when another server has the storage.
    """

    def __init__(self, device: Device, *, drain_timeout_s: float) -> None:
        self._device = device
        self._queues = queues = device.queues
        self._name = device.name
        self._max_size = device.max_queue_size
        self._drain_timeout_s = drain_timeout_s
        self._states = [RingState()] * queues.num_queues
        self._plans: list[RingPlan[Fd]] = [RingPlan()] * queues.num_queues
        self._running: set[int] = set()
        self._tracked: set[int] = set()
        self._enable_seen = False
        self._kept_timeout_s = drain_timeout_s
        self.memory = GuestMemory()
        self.inflight: InflightRegion | None = None
        """Where rings that start from now on keep what is in flight."""
        self.log: DirtyLog | None = None
        self._log_fd: Fd | None = None
        self.features = 0
        """The bits of the last SET_FEATURES, virtio's and the protocol's."""
        self.resting = False
        """No ring takes anything, whatever its state says."""
        self.leaves = False
        """GET_VRING_BASE leaves in the in-flight region what storage has not got (GET_VRING_BASE_INFLIGHT)."""

    def state(self, index: int) -> RingState:
        """The two bits of ring ``index``."""
        return self._states[self._checked(index)]

    @property
    def running(self) -> frozenset[int]:
        """The rings that the native queues have started."""
        return frozenset(self._running)

    @property
    def active(self) -> bool:
        """Whether any ring runs and is enabled, so that the device is in use. Any thread."""
        return any(self._states[index].enabled for index in tuple(self._running))

    @property
    def waiting_for_memory(self) -> bool:
        """Whether an enabled ring lacks nothing but memory."""
        return not self.memory.regions and any(
            state.enabled and plan.missing(memory=False) == ("SET_MEM_TABLE",)
            for state, plan in zip(self._states, self._plans, strict=True)
        )

    def set_features(self, features: int) -> None:
        """SET_FEATURES. Without the protocol features bit, SET_VRING_ENABLE will not come: every ring is enabled.

        VHOST_F_LOG_ALL counts at once, also while rings run; all other bits count for rings that start from now on.
        """
        if (self.features ^ features) & F_LOG_ALL:
            self._log_to(self.log, features)
        self.features = features
        if not features & F_PROTOCOL_FEATURES:
            for index in range(len(self._states)):
                self._enable(index, RingEvent.NO_PROTOCOL_FEATURES)

    def forget_features(self) -> None:
        """SET_STATUS 0: virtio's features are negotiated anew, and so is the dirty log."""
        if self.features & F_LOG_ALL:
            self._log_to(self.log, 0)
        self.features &= F_PROTOCOL_FEATURES

    def set_memory(self, memory: GuestMemory) -> None:
        """Put ``memory`` under all rings and start those that waited for it. Waits for operations that use the old one.

        Raises `DrainTimeout`; the old memory then stays.
        """
        self._queues.set_memory(memory, self._drain_timeout_s)
        self.memory = memory
        for index, plan in enumerate(self._plans):
            if plan.kicked and index not in self._running:
                try:
                    self._start_if_complete(index)
                except SetupError as error:  # what is missing may come with the next region
                    log.warning("%s: ring %d does not start yet: %s", self._name, index, error)

    def set_log(self, log: DirtyLog) -> None:
        """SET_LOG_BASE: nothing is noted in the log before any more. Raises `DrainTimeout`."""
        self._log_to(log, self.features)
        self.log = log

    def set_log_fd(self, fd: Fd) -> None:
        """SET_LOG_FD: what is signalled when something was noted in the log. ``fd`` stays the caller's."""
        before, self._log_fd = self._log_fd, fd.duplicate()
        try:
            self._log_to(self.log, self.features)
        except BaseException:
            self._log_fd.close()
            self._log_fd = before
            raise
        if before is not None:
            before.close()

    def _log_to(self, log: DirtyLog | None, features: int) -> None:
        notify = self._log_fd.fileno() if self._log_fd is not None else None
        self._queues.set_log(log, data=bool(features & F_LOG_ALL), notify=notify, timeout_s=self._drain_timeout_s)

    def set_num(self, index: int, num: int) -> None:
        """SET_VRING_NUM: the size of a ring that does not run, a power of two."""
        if not 1 <= num <= self._max_size or num & (num - 1):
            raise SetupError(
                f"ring {index} may not have {num} entries: powers of two up to {self._max_size} are served"
            )
        self._change_stopped(index, "size", replace(self._plans[self._checked(index)], num=num))

    def set_base(self, index: int, base: int) -> None:
        """SET_VRING_BASE: where a ring that does not run goes on."""
        if base & ~SPLIT_BASE_MASK:
            raise SetupError(f"ring {index} cannot start at {base:#x}: an index of a split ring has 16 bits")
        self._change_stopped(index, "base", replace(self._plans[self._checked(index)], base=base))

    def set_addr(self, index: int, addr: VringAddr) -> None:
        """SET_VRING_ADDR. On a running ring only the flags and the log address may differ."""
        plan = self._plans[self._checked(index)]
        if index in self._running:
            old = plan.addr
            if old is None or replace(old, flags=addr.flags, log=addr.log) != addr:
                raise SetupError(f"ring {index} runs and cannot be moved")
            self._queues.set_log_used(index, addr.log_used)
            self._plans[index] = replace(plan, addr=addr)
        else:
            self._change_stopped(index, "place", replace(plan, addr=addr))

    def set_kick(self, index: int, fd: Fd | None) -> None:
        """SET_VRING_KICK: start the ring, now or as soon as its description is complete. No ``fd``: it is polled."""
        plan = self._plans[self._checked(index)]
        own = fd.duplicate() if fd is not None else None
        self._plans[index] = replace(plan, kicked=True, kick=own)
        try:
            if index in self._running:
                self._queues.set_kick(index, own.fileno() if own is not None else None)
            else:
                self._start_if_complete(index)
        except BaseException:
            self._plans[index] = plan
            if own is not None:
                own.close()
            raise
        self._states[index] = self._states[index].after(RingEvent.KICK)
        if plan.kick is not None:
            plan.kick.close()

    def set_call(self, index: int, fd: Fd | None) -> None:
        """SET_VRING_CALL: replace what the driver is notified through; no descriptor: it is not notified."""
        plan = self._plans[self._checked(index)]
        own = fd.duplicate() if fd is not None else None
        if index in self._running:
            self._queues.set_call(index, own.fileno() if own is not None else None)
        self._plans[index] = replace(plan, call=own)
        if plan.call is not None:
            plan.call.close()

    def set_err(self, index: int, fd: Fd | None) -> None:
        """SET_VRING_ERR: replace what tells the front-end that the ring is broken."""
        plan = self._plans[self._checked(index)]
        own = fd.duplicate() if fd is not None else None
        if index in self._running:
            self._queues.set_err(index, own.fileno() if own is not None else None)
        self._plans[index] = replace(plan, err=own)
        if plan.err is not None:
            plan.err.close()

    def set_enable(self, index: int, enabled: bool) -> None:
        """SET_VRING_ENABLE: may come before anything else is known of the ring, and outlives its stop."""
        self._enable(self._checked(index), RingEvent.ENABLE if enabled else RingEvent.DISABLE)
        self._enable_seen = True

    def get_base(self, index: int) -> int:
        """GET_VRING_BASE: stop the ring, wait until what it took is done, and return its next index.

        With `leaves`, and a region to leave it in, what storage has not been given yet or has failed and is kept counts
        as taken and is not answered. A ring that does not run, or is broken, answers its base. Raises `DrainTimeout`.
        """
        base = self._plans[self._checked(index)].base
        if index in self._running:
            base = self._stop(index, self._drain_timeout_s, leave=self.leaves and index in self._tracked)
            self._rest_if_idle()
        self._states[index] = self._states[index].after(RingEvent.GET_BASE)
        self._forget_kick(index, base)
        return base

    def reset(self) -> None:
        """RESET_DEVICE, SET_STATUS 0: stop and disable every ring. Memory, CALL and ERR stay. Raises `DrainTimeout`."""
        for index in sorted(self._running):
            self._queues.enable(index, False)
        for index in sorted(self._running):
            self._stop(index, self._drain_timeout_s)
        self._rest_if_idle()
        for index, plan in enumerate(self._plans):
            self._states[index] = self._states[index].after(RingEvent.RESET)
            self._forget_kick(index, 0)
            self._plans[index] = plan.reset()
        self.inflight = None  # it belongs to the rings that were; QEMU gets another one, too

    def rest(self) -> None:
        """Let every ring take nothing more, those that start later included; what was taken still completes. Does not
        wait."""
        for index in self._running:
            self._queues.enable(index, False)
        self.resting = True

    def resume(self) -> None:
        """Let every ring that is enabled go on after `rest`."""
        self.resting = False
        for index in self._running:
            self._queues.enable(index, self._states[index].enabled)

    def drain(self, timeout_s: float, *, answer: bool) -> None:
        """Stop every ring, and let go of the memory. Raises `DrainTimeout`; may be called again then.

        What storage has not been given yet, or has failed and is kept, is left in the in-flight region. Without one
        such requests are dropped or, with ``answer``, those that are kept are answered with their errors.
        """
        leave = self.inflight is not None or not answer
        self._kept_timeout_s = 0.0
        deadline = time.monotonic() + timeout_s
        self.rest()
        for index in sorted(self._running):
            self._stop(index, max(0.0, deadline - time.monotonic()), leave=leave)
        self._queues.set_memory(GuestMemory(), max(0.0, deadline - time.monotonic()))
        self._rest_if_idle()
        self._queues.set_log(None, data=False)
        self.memory = GuestMemory()
        self.log = None
        self.inflight = None

    def close(self) -> None:
        """Close every descriptor kept here. The rings must have been drained, or given up."""
        for index, plan in enumerate(self._plans):
            for fd in (plan.kick, plan.call, plan.err):
                if fd is not None:
                    fd.close()
            self._plans[index] = RingPlan()
        if self._log_fd is not None:
            self._log_fd.close()

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self._plans):
            raise SetupError(f"there is no ring {index}: the device has {len(self._plans)}")
        return index

    def _enable(self, index: int, event: RingEvent) -> None:
        after = self._states[index].after(event)
        if index in self._running and after.enabled != self._states[index].enabled:
            self._queues.enable(index, after.enabled and not self.resting)
        self._states[index] = after

    def _change_stopped(self, index: int, what: str, plan: RingPlan[Fd]) -> None:
        if index in self._running:
            raise SetupError(f"ring {index} runs: its {what} cannot be changed")
        old, self._plans[index] = self._plans[index], plan
        try:
            self._start_if_complete(index)
        except (SetupError, OperatorError):
            self._plans[index] = old
            raise

    def _start_if_complete(self, index: int) -> None:
        plan = self._plans[index]
        missing = plan.missing(memory=bool(self.memory.regions))
        if missing or plan.addr is None or plan.num is None:
            if plan.kicked:
                log.debug("%s: ring %d waits for %s", self._name, index, ", ".join(missing))
            return
        state = self._states[index]
        if not self.features & F_PROTOCOL_FEATURES and not self._enable_seen:
            state = state.after(RingEvent.NO_PROTOCOL_FEATURES)  # crosvm may leave out SET_FEATURES, but not ENABLE
        if not self._running:
            self._device.activate()
        try:
            self._start(index, plan, state, plan.num, plan.addr)
        except BaseException:
            self._rest_if_idle(unused=True)
            raise
        self._states[index] = state
        self._kept_timeout_s = self._drain_timeout_s

    def _start(self, index: int, plan: RingPlan[Fd], state: RingState, size: int, addr: VringAddr) -> None:
        self._queues.set_log_used(index, addr.log_used)
        self._queues.start(
            index,
            size=size,
            desc=addr.descriptor,
            used=addr.used,
            avail=addr.available,
            base=plan.base,
            features=self.features & ~(F_PROTOCOL_FEATURES | F_LOG_ALL),
            enabled=state.enabled and not self.resting,
            kick=plan.kick.fileno() if plan.kick is not None else None,
            call=plan.call.fileno() if plan.call is not None else None,
            err=plan.err.fileno() if plan.err is not None else None,
            inflight=self.inflight,
        )
        self._running.add(index)
        if self.inflight is not None:
            self._tracked.add(index)

    def _rest_if_idle(self, *, unused: bool = False) -> None:
        """Once no ring runs, nothing of the storage is used, and somebody else may have it."""
        if not self._running:
            self._device.deactivate(unused=unused)

    def _stop(self, index: int, timeout_s: float, *, leave: bool = False) -> int:
        begin = time.monotonic()
        try:
            base = self._queues.stop(index, timeout_s, leave=leave, kept_timeout_s=self._kept_timeout_s)
        except DrainTimeout as error:
            raise DrainTimeout(f"ring {index} still waits for storage after {timeout_s:.0f} s: {error}") from error
        # A hypervisor stops one ring after the other and waits: for failed requests of all of them no longer than once.
        self._kept_timeout_s = max(0.0, self._kept_timeout_s - (time.monotonic() - begin))
        self._running.discard(index)
        self._tracked.discard(index)
        return base

    def _forget_kick(self, index: int, base: int) -> None:
        plan = self._plans[index]
        self._plans[index] = plan.stopped(base)
        if plan.kick is not None:
            plan.kick.close()
