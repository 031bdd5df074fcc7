"""The host side of one virtio device of any type. Touches one connection, its back-end channel and shared memory.

The order of messages is QEMU's (vhost-user: Communication), so that a back-end sees nothing that it does not know from
there. Nothing is required of it but what the caller says.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from vhostuser.errors import BackendRefused, BackendUnfit, RemoteProtocolError, SetupError
from vhostuser.fds import Fd
from vhostuser.frontend.channel import BackendChannel
from vhostuser.frontend.device_state import Stateful
from vhostuser.frontend.dialogue import Dialogue
from vhostuser.frontend.dirty_log import HostLog, Logging
from vhostuser.frontend.inflight import HostInflight, received
from vhostuser.frontend.memory import SharedMemory
from vhostuser.frontend.negotiated import USABLE, Life, Queue
from vhostuser.frontend.reach import Endpoint, name_of_endpoint, reach
from vhostuser.protocol import (
    F_ACCESS_PLATFORM,
    F_PROTOCOL_FEATURES,
    REQUIRED_WITH,
    U64,
    FrontendRequest,
    Inflight,
    Iotlb,
    IotlbPerm,
    IotlbType,
    MemoryTable,
    ProtocolFeature,
    SingleRegion,
    VringFd,
    VringState,
)
from vhostuser.protocol.negotiation import names
from vhostuser.virtio.features import feature_names
from vhostuser.virtio.status import DeviceStatus

Req = FrontendRequest

NO_FEATURE: Final = ProtocolFeature(0)

MAX_QUEUES: Final = 256
"""A ring is named by one byte in SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR."""


class HostDevice(Logging, Stateful):
    """One device behind one connection: `realize`, `start`, `stop` or `reset`, `start` again, `close`.

    The life cycle is for one thread at a time; configuration and properties may be used from any. Every wait has a time
    limit. Once the connection breaks, every method raises what broke it, and only `close` is left to do.

    With INFLIGHT_SHMFD (`RESUMABLE`) the rings can go on behind another back-end, which answers what the one that is
    gone left unanswered; nothing is put into them again. Keep memory and queues as they are, and hand the region over::

        region = device.take_inflight()  # None: the back-end has none, and what was under way is lost
        device.close()
        device = HostDevice(path, features=..., protocol_features=RESUMABLE)
        device.realize()
        device.start(memory, queues, inflight=region)

    Without a region, neither is to be used again: the old back-end may still write into them.

    The same goes on at another back-end while the first one is there (`MOVABLE`): `stop` it, with ``leave`` if need be,
    take region and state, and start the other one with them. `start_log` is for who copies the memory meanwhile.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        listen: bool = False,
        features: int = 0,
        protocol_features: ProtocolFeature = USABLE,
        require: ProtocolFeature = NO_FEATURE,
        timeout_s: float = 10.0,
        drain_timeout_s: float = 30.0,
        stop: threading.Event | None = None,
    ) -> None:
        """Connect to ``endpoint``: a path, or an inherited descriptor or transport, which it takes over.

        ``listen``: be the server and wait for the back-end to connect. ``features`` and ``protocol_features`` are what
        the caller can use; without ``require`` it cannot do. ``timeout_s`` bounds the wait for each answer and for the
        connection, ``drain_timeout_s`` the wait for requests in flight when a ring is stopped. ``stop`` ends the
        wait for the connection when it is set. Raises `OperatorError` when nobody is there.
        """
        transport = reach(endpoint, listen=listen, timeout_s=timeout_s, stop=stop)
        super().__init__(
            name_of_endpoint(endpoint),
            Dialogue(transport, timeout_s=timeout_s),
            features=features,
            protocol_features=protocol_features | require,
        )
        self.max_queues = 1
        """How many queues can be used, 1 to 256; 1 when the back-end does not say."""
        self.max_mem_slots: int | None = None
        """How many memory regions it takes; None when it does not say, which means at least 8."""
        self._required = require
        self._drain_timeout_s = drain_timeout_s
        self._channel: BackendChannel | None = None
        self._inflight: HostInflight | None = None

    def fileno(self) -> int:
        """The main socket, to watch for a hang-up only: reading is for the dialogue. -1 once closed."""
        return self.dialogue.fileno()

    @property
    def serving(self) -> bool:
        """Whether the caller runs on the thread of the back-end channel, which cannot end itself."""
        return self._channel is not None and self._channel.serving

    @property
    def quiet(self) -> bool:
        """Whether no listener runs, and none will: after `close` without waiting."""
        return self.life is Life.CLOSED and (self._channel is None or not self._channel.running)

    def realize(self) -> None:
        """Negotiate what is decided once per connection. Raises `BackendUnfit` when something required is missing."""
        self._expect(Life.CONNECTED)
        dialogue = self.dialogue
        offered = dialogue.number(Req.GET_FEATURES)
        if offered & F_PROTOCOL_FEATURES:
            known = ProtocolFeature(dialogue.number(Req.GET_PROTOCOL_FEATURES))
            dialogue.tell(Req.SET_PROTOCOL_FEATURES, U64(_choose(known & self._wanted_protocol)))
        if lacking := self._required & ~self.protocol_features:
            raise BackendUnfit(
                self.name,
                f"it does not offer protocol feature {names(lacking)}",
                "Use a back-end that does: this kind of device cannot be driven without it",
            )
        if ProtocolFeature.MQ in self.protocol_features:
            self.max_queues = min(dialogue.number(Req.GET_QUEUE_NUM), MAX_QUEUES)
            if not self.max_queues:
                raise BackendUnfit(self.name, "it has no queues", "Report it to the makers of the back-end")
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol_features:
            self.max_mem_slots = dialogue.number(Req.GET_MAX_MEM_SLOTS)
        if ProtocolFeature.BACKEND_REQ in self.protocol_features:
            self._open_channel()
        dialogue.tell(Req.SET_OWNER)
        dialogue.number(Req.GET_FEATURES)
        self.life = Life.REALIZED

    def _open_channel(self) -> None:
        self._channel = channel = BackendChannel(
            self.dialogue.connection,
            config_changed=self._hear_config,
            translate=self._translate,
            send_timeout_s=self.dialogue.timeout_s,
        )
        self.dialogue.tell(Req.SET_BACKEND_REQ_FD, fds=[channel.theirs])
        channel.theirs.close()
        channel.start()

    def start(
        self,
        memory: SharedMemory,
        queues: Sequence[Queue],
        *,
        inflight: HostInflight | None = None,
        log: HostLog | None = None,
    ) -> None:
        """Share ``memory`` and start ``queues``, which lie in it and stay the caller's. Returns once they run.

        ``inflight`` is the region of a connection that is lost, or that stopped and left requests in it, on which these
        very queues ran: they go on from there. It is taken over, also by a start that fails. Without one, and with
        INFLIGHT_SHMFD, the back-end is asked for a fresh one, unless `stop` left requests in that of this connection.
        ``log`` is the dirty log of a connection that is lost; it is taken over, too. Raises `BackendRefused` when the
        back-end does not want something of it, `BackendUnfit` when it does not accept the features, or not those that
        the queues use already; the connection is of no further use then.
        """
        self._expect(Life.REALIZED)
        if inflight is None and self._inflight is not None and self._inflight.left:
            inflight = self.take_inflight()
        self._drop_inflight()
        if inflight is not None:
            self._inflight = inflight
            self.check_resumable(inflight)
        if log is not None:
            self.check_logging()
            self._log = log
        left = inflight.left if inflight is not None else 0
        self.accept_features()
        if inflight is None and queues and ProtocolFeature.INFLIGHT_SHMFD in self.protocol_features:
            self._inflight = self._ask_inflight(queues)
        if self._inflight is not None:
            self.dialogue.tell(Req.SET_INFLIGHT_FD, self._inflight.payload, [self._inflight.fd])
        self._share(memory)
        for queue in queues:
            if inflight is not None and not left:
                queue.base = queue.used_index  # as QEMU; who has the region knows better
            self._set_up(queue)
        self._offer_log()
        self._enable(queues, 1)
        self._set_status(
            DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK
        )
        if inflight is not None:
            inflight.left = 0
        self._queues = tuple(queues)
        self.life = Life.STARTED
        for queue in queues:  # older back-ends start a ring when it is first kicked
            queue.notify()

    def check_resumable(self, inflight: HostInflight) -> None:
        """Raise `BackendUnfit` when rings that use ``inflight`` cannot go on here. `start` looks, too."""
        advice = "Start the one that was there before, with the same options"
        if ProtocolFeature.INFLIGHT_SHMFD not in self.protocol_features:
            raise BackendUnfit(self.name, "it does not offer INFLIGHT_SHMFD, and requests are under way", advice)
        if lacking := inflight.features & ~self.features:
            cause = f"it does not offer what the requests under way use: {' '.join(feature_names(lacking))}"
            raise BackendUnfit(self.name, cause, advice)
        if self.features != inflight.features:
            raise SetupError(f"the queues use features {inflight.features:#x}, not {self.features:#x}")

    def _ask_inflight(self, queues: Sequence[Queue]) -> HostInflight | None:
        asked = Inflight(0, 0, max(queue.index for queue in queues) + 1, max(queue.size for queue in queues))
        try:
            return received(self.dialogue.ask(Req.GET_INFLIGHT_FD, asked), asked, self.features)
        except RemoteProtocolError as error:
            self.dialogue.fail(error)
            raise

    @property
    def inflight(self) -> HostInflight | None:
        """The region of the rings, while they run and there is one; `close` gives it up."""
        return self._inflight

    def take_inflight(self) -> HostInflight | None:
        """The region of the rings, which is the caller's from now on: for `start` on a later connection."""
        taken, self._inflight = self._inflight, None
        return taken

    def _drop_inflight(self) -> None:
        if (dropped := self.take_inflight()) is not None:
            dropped.close()

    def _set_up(self, queue: Queue) -> None:
        tell, index = self.dialogue.tell, queue.index
        tell(Req.SET_VRING_NUM, VringState(index, queue.size))
        tell(Req.SET_VRING_BASE, VringState(index, queue.base))
        tell(Req.SET_VRING_ADDR, self._addr(queue))
        tell(Req.SET_VRING_CALL, VringFd.of(index), [queue.call])
        tell(Req.SET_VRING_ERR, VringFd.of(index), [queue.err])
        tell(Req.SET_VRING_KICK, VringFd.of(index), [queue.kick])

    def _enable(self, queues: Sequence[Queue], enable: int) -> None:
        if self.features_offered & F_PROTOCOL_FEATURES:  # without it rings are always enabled
            for queue in queues:
                self.dialogue.tell(Req.SET_VRING_ENABLE, VringState(queue.index, enable))
        self.dialogue.settle()

    def _share(self, memory: SharedMemory) -> None:
        """Tell the back-end of ``memory``, unless it knows it: it keeps it when rings stop and devices are reset."""
        if memory is self._memory:
            return
        with Fd(os.dup(memory.arena.fd)) as fd:
            if self.max_mem_slots:
                if self._memory is not None:
                    self.dialogue.tell(Req.REM_MEM_REG, SingleRegion(self._memory.region))
                self.dialogue.tell(Req.ADD_MEM_REG, SingleRegion(memory.region), [fd])
            else:
                self.dialogue.tell(Req.SET_MEM_TABLE, MemoryTable((memory.region,)), [fd])
        self.dialogue.settle()
        self._memory = memory
        if self.features & F_ACCESS_PLATFORM:
            self._send_translation()

    def _send_translation(self) -> None:
        """Addresses behind the IOMMU are the guest's own, so one translation serves for all."""
        if self._memory is None:
            return
        region = self._memory.region
        access = IotlbPerm.READ | IotlbPerm.WRITE
        update = Iotlb(region.guest_addr, region.size, region.user_addr, access, IotlbType.UPDATE)
        answer = self.dialogue.ask(Req.IOTLB_MSG, update).payload
        if isinstance(answer, U64) and answer.value:
            raise BackendRefused("IOTLB_MSG", answer.value)

    def _translate(self, miss: Iotlb) -> bool:
        """Answer a miss of the back-end, on the thread of its channel."""
        memory = self._memory
        if memory is None or not memory.guest_addr <= miss.iova < memory.guest_addr + memory.size:
            return False
        self._send_translation()
        return True

    def stop(self, *, leave: bool = False) -> int:
        """Stop the rings: returns once every request in flight is answered, at most ``drain_timeout_s`` for each ring.

        With ``leave``, which takes GET_VRING_BASE_INFLIGHT, the back-end need not answer what its storage has not begun
        yet: that stays in the region, for `start` here or, after `take_inflight`, elsewhere. Returns how many requests
        stayed. Each queue's ``base`` is where it stopped then. A back-end with that feature may leave requests in
        any case.
        """
        self._expect(Life.STARTED)
        if leave and ProtocolFeature.GET_VRING_BASE_INFLIGHT not in self.protocol_features:
            raise SetupError(f"{self.name} has to answer everything: GET_VRING_BASE_INFLIGHT was not negotiated")
        skip_drain = leave and ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN in self.protocol_features
        request = Req.GET_VRING_BASE_SKIP_DRAIN if skip_drain else Req.GET_VRING_BASE
        self._enable(self._queues, 0)
        for queue in self._queues:
            asked = VringState(queue.index, 0)
            answer = self.dialogue.ask(request, asked, timeout_s=self._drain_timeout_s).payload
            if not isinstance(answer, VringState) or answer.index != queue.index or answer.num > 0xFFFF:
                wrong = RemoteProtocolError(f"{request.name} of ring {queue.index} was answered with {answer}")
                self.dialogue.fail(wrong)
                raise wrong
            queue.base = answer.num
        left = sum(queue.base - queue.used_index & 0xFFFF for queue in self._queues)
        if self._inflight is not None and ProtocolFeature.GET_VRING_BASE_INFLIGHT in self.protocol_features:
            self._inflight.left = left
        if self._inflight is None or not self._inflight.left:
            self._drop_inflight()
        self._queues = ()
        self.life = Life.REALIZED
        return left

    def reset(self) -> None:
        """Stop the rings if they run, and bring the device to its initial state as far as the back-end knows how.

        Requests that were left in the region are lost then.
        """
        if self.life is Life.STARTED:
            self.stop()
        self._expect(Life.REALIZED)
        self._drop_inflight()
        self._set_status(DeviceStatus(0))
        if ProtocolFeature.RESET_DEVICE in self.protocol_features:
            self.dialogue.tell(Req.RESET_DEVICE)
        self.dialogue.settle()

    def close(self, *, wait: bool = True) -> None:
        """Unrealize: hang up and give everything back. Does not stop the rings: call `stop` before. Idempotent.

        Waits for a listener that hears of the configuration now; without ``wait`` it may go on for a while.
        """
        self.life = Life.CLOSED
        self.dialogue.close()
        if self._channel is not None:
            self._channel.close(wait=wait)
        self._drop_inflight()
        self._queues = ()
        self._memory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _choose(features: ProtocolFeature) -> ProtocolFeature:
    """``features`` without those that need others that are not there."""
    for feature, others in REQUIRED_WITH.items():
        if feature in features and others & ~features:
            features &= ~feature
    return features
