"""One connection of one front-end to one device. Touches the connection, the back-end channel and the native queues.

A session runs on one thread and finishes each message before it reads the next. Each message is one call on the rings
or the device, and an answer.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from vhostuser.backend.device import LOOK_S, SESSION_FEATURES, ConfigNotice, Device
from vhostuser.backend.device_state import DeviceState
from vhostuser.backend.hints import SHARE_HINT, SharingCheck
from vhostuser.backend.inflight import Keepsake, make_region, take_region
from vhostuser.backend.news import News
from vhostuser.backend.reports import report
from vhostuser.backend.ring_messages import obey_ring_message
from vhostuser.backend.vrings import Vrings
from vhostuser.errors import (
    ConfigRefused,
    DrainTimeout,
    GuestMemoryError,
    OperatorError,
    PeerGone,
    RemoteProtocolError,
    SetupError,
    VhostUserError,
)
from vhostuser.fds import Fd
from vhostuser.protocol import (
    U64,
    Config,
    Connection,
    DeviceStateParams,
    DeviceStateReply,
    FrontendRequest,
    Inflight,
    Message,
    Payload,
    ProtocolFeature,
    Refused,
    Role,
    describe,
)
from vhostuser.protocol.messages import name_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhostuser.transport import Transport

Req = FrontendRequest

REFUSALS = (SetupError, GuestMemoryError, ConfigRefused, DrainTimeout, OperatorError, OSError)
"""What makes us refuse a message; the state is as before it."""

log = logging.getLogger(__name__)


ENDINGS: Final = {"memory_lost": "guest memory was lost", "worker_failed": "a queue worker has ended"}
"""What happens natively that leaves nothing to serve."""


class SessionOver(VhostUserError):  # noqa: N818  not a failure by itself
    """The connection has to end; the text says why."""


class Session:
    """Serves one front-end until it leaves, breaks the protocol, or `stop` is called."""

    def __init__(
        self,
        device: Device,
        transport: Transport,
        *,
        drain_timeout_s: float = 30.0,
        stop_timeout_s: float | None = None,
    ) -> None:
        """Takes ``transport``. ``drain_timeout_s`` bounds every wait for storage that a message makes necessary,
        ``stop_timeout_s`` the one after `stop`."""
        self._device = device
        self._transport = transport
        self._stop_timeout_s = drain_timeout_s if stop_timeout_s is None else stop_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._connection: Connection[Fd] = Connection(Role.BACKEND)
        self._connection.offer(device.features | SESSION_FEATURES, device.protocol_features)
        self._rings = Vrings(device, drain_timeout_s=drain_timeout_s)
        self._sharing = SharingCheck(device.name, device.queues, self._rings)
        self._selector = selectors.DefaultSelector()
        self._news = News(device, self._rings, self._connection, self._selector)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._mailbox = threading.Lock()
        self._stopping = False
        self._resting = False
        self._status = 0
        self._state = DeviceState(device, self._rings, timeout_s=drain_timeout_s)
        self._keepsake: Keepsake | None = None
        self._open = True

    @property
    def open(self) -> bool:
        """Whether the connection is still there: False once the peer has gone or the session ended it. Any thread."""
        return self._open

    @property
    def recoverable(self) -> bool:
        """Whether requests that are never answered stay in a region of the front-end. Any thread."""
        return self._rings.inflight is not None

    @property
    def at_rest(self) -> bool:
        """Whether no ring takes anything more. Any thread."""
        return self._rings.resting

    def rest(self, resting: bool) -> None:
        """Ask that no ring takes anything more, or that they go on. Any thread; does not wait."""
        with self._mailbox:
            self._resting = resting
            self._notify()

    def stop(self) -> None:
        """Ask the session to end: what was taken completes, then it hangs up. Any thread; does not wait."""
        with self._mailbox:
            self._stopping = True
            self._notify()

    def peer_left(self) -> bool:
        """Whether the peer has closed its end, even if the session is too busy to have seen it. Any thread."""
        with self._mailbox:
            return not self._open or self._transport.peer_hung_up()

    def run(self) -> None:
        """Serve until the end, and return once every ring is stopped and everything is given back.

        Whatever the peer does ends in a log line here and in no exception.
        """
        device = self._device
        device.attach(self._announce)
        try:
            self._serve()
            log.info("%s: the front-end has left", device.name)
        except (SessionOver, RemoteProtocolError, PeerGone) as error:
            log.error("%s: the connection ended: %s", device.name, error)
        except Exception:
            log.exception("%s: the connection ended: an error of our own", device.name)
        finally:
            self._end()

    def _serve(self) -> None:
        watch = self._selector.register
        watch(self._transport, selectors.EVENT_READ, self._receive)
        watch(self._device.queues.events_fd, selectors.EVENT_READ, self._take_events)
        watch(self._wake, selectors.EVENT_READ, self._take_mail)
        while not self._connection.closed and not self._stopping:
            for key, _ in self._selector.select(self._patience_s()):
                handle: Callable[[], None] = key.data
                handle()
            self._sharing.look_again()

    def _patience_s(self) -> float | None:
        """How long to wait for the peer before something else is due; None: for ever, as while rings run."""
        looks = not self._rings.running and self._device.look_for_heir()
        waits = [LOOK_S] * looks
        if (patience := self._sharing.patience_s()) is not None:
            waits.append(patience)
        return min(waits, default=None)

    def _receive(self) -> None:
        data, fds = self._transport.receive(self._connection.want)
        self._connection.receive(data, fds)
        while True:
            try:
                event = self._connection.next_event()
            finally:
                unwanted = self._connection.refused_fds()
                for fd in unwanted:
                    fd.close()
            match event:
                case Message():
                    self._answer(event)
                case Refused(request, _, reason):
                    bare = request in (Req.SET_MEM_TABLE, Req.ADD_MEM_REG) and not unwanted
                    self._refuse(event, f"{reason}. {SHARE_HINT}" if bare else reason)
                case _:
                    return

    def _answer(self, message: Message[Fd]) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s: %s", self._device.name, describe(message))
        try:
            reply = self._carry_out(message)
        except REFUSALS as error:
            self._refuse(message, str(error))
        else:
            if reply is not None:
                payload, fds = reply
                with ExitStack() as ours:
                    for fd in fds:
                        ours.enter_context(fd)
                    self._transport.send(*self._connection.answer(message, payload, fds))
            elif (ack := self._connection.acknowledge(message)) is not None:
                self._transport.send(*ack)
        finally:
            for fd in message.fds:
                fd.close()
        self._sharing.look()
        self._news.tell()

    def _refuse(self, event: Message[Fd] | Refused, reason: str) -> None:
        reason = f"{name_of(event.request)} is refused: {reason}"
        nack = self._connection.acknowledge(event, 1)
        if nack is None:
            raise SessionOver(reason)
        log.warning("%s: %s", self._device.name, reason)
        self._transport.send(*nack)

    def _carry_out(self, message: Message[Fd]) -> tuple[Payload, tuple[Fd, ...]] | None:
        """Do what ``message`` says and return its own reply, or None where an acknowledgement is all there is.

        Descriptors of the reply are the caller's to close.
        """
        match message:
            case Message(Req.GET_INFLIGHT_FD, Inflight() as wanted):
                return make_region(self._device, wanted)
        reply = self._obey(message)
        return None if reply is None else (reply, ())

    def _obey(self, message: Message[Fd]) -> Payload | None:
        device, rings = self._device, self._rings
        match message:
            case Message(Req.GET_FEATURES):
                return U64(device.features | SESSION_FEATURES)
            case Message(Req.SET_FEATURES, U64(features)):
                device.features_acked(features & ~SESSION_FEATURES)
                rings.set_features(features)
            case Message(Req.GET_PROTOCOL_FEATURES):
                return U64(device.protocol_features)
            case Message(Req.SET_PROTOCOL_FEATURES, U64(chosen)):  # the connection keeps them
                rings.leaves = ProtocolFeature.GET_VRING_BASE_INFLIGHT in ProtocolFeature(chosen)
            case Message(Req.SET_OWNER):
                pass  # an owner is one whoever it is
            case Message(Req.RESET_OWNER):
                log.info("%s: RESET_OWNER does nothing, as the specification advises", device.name)
            case Message(Req.GET_QUEUE_NUM):
                return U64(device.num_queues)
            case Message(Req.SET_INFLIGHT_FD, Inflight() as told, (fd,)):
                rings.inflight = take_region(device, told, fd)
                self._keepsake = Keepsake(device, rings.inflight, told)
                self._keepsake.recall()
                self._keepsake.keep()
            case Message(Req.SET_BACKEND_REQ_FD, _, (fd,)):
                self._news.open(fd.duplicate())
            case Message(Req.GET_CONFIG, Config(offset, size, flags)):
                self._news.served()
                return Config(offset, size, flags, device.read_config(offset, size).ljust(size, b"\0"))
            case Message(Req.SET_CONFIG, Config(offset, _, flags, data)):
                device.write_config(offset, data, flags)
                self._keep()
            case Message(Req.SET_DEVICE_STATE_FD, DeviceStateParams(direction), (fd,)):
                self._state.begin(direction, fd.duplicate())
                return DeviceStateReply.of()
            case Message(Req.CHECK_DEVICE_STATE):
                self._state.check(lambda: self._stopping or self._transport.peer_hung_up())
                self._keep()
                return U64(0)
            case Message(Req.RESET_DEVICE):
                self._reset()
            case Message(Req.GET_STATUS):
                return U64(self._status)
            case Message(Req.SET_STATUS, U64(status)):
                self._set_status(status)
            case Message(FrontendRequest()):
                return obey_ring_message(rings, message)
            case _:
                self._ignore(message)
        return None

    def _ignore(self, message: Message[Fd]) -> None:
        """A request that is in no specification we know: the peer is told when it asked, and may go on in any case."""
        log.warning("%s: %s is not known and was ignored", self._device.name, name_of(message.request))
        nack = self._connection.acknowledge(message, 1)
        if nack is not None:
            self._transport.send(*nack)

    def _set_status(self, status: int) -> None:
        if status == 0:
            self._reset()
            self._rings.forget_features()
        else:
            self._device.status_changed(status)
        self._status = status

    def _keep(self) -> None:
        if self._keepsake is not None:
            self._keepsake.keep()

    def _reset(self) -> None:
        self._rings.reset()
        self._keepsake = None
        self._device.reset()
        self._status = 0

    def _take_events(self) -> None:
        for event in self._device.queues.take_events():
            if event.kind in ENDINGS:
                raise SessionOver(f"{ENDINGS[event.kind]}: {event.reason}")
            report(self._device.name, event)

    def _take_last_events(self) -> None:
        """Leave none to the next session: lost memory must not end a connection that has other memory."""
        for event in self._device.queues.take_events():
            if event.kind != "memory_lost":
                report(self._device.name, event)

    def _take_mail(self) -> None:
        os.eventfd_read(self._wake)
        if self._resting != self._rings.resting:
            self._rings.rest() if self._resting else self._rings.resume()
        self._news.tell()

    def _notify(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _announce(self) -> ConfigNotice:
        """The device's way to say that its configuration changed. Any thread."""
        with self._mailbox:
            if not self._open:
                return ConfigNotice.NOT_CONNECTED
            self._notify()
            return self._news.notice()

    def _end(self) -> None:
        """Give everything back. The connection is closed first unless it is we who leave."""
        self._keepsake = None  # it has the region open
        with ExitStack() as last:
            for step in (self._let_go, self._device.reset, self._rings.close, self._news.close, self._state.close):
                last.callback(step)
            last.callback(self._device.attach, None)
            last.callback(self._hang_up)
            if not self._stopping:
                self._hang_up()
            self._drain()
            self._take_last_events()

    def _let_go(self) -> None:
        self._selector.close()
        with self._mailbox:
            os.close(self._wake)
            self._wake = -1

    def _hang_up(self) -> None:
        with self._mailbox:
            self._open = False
            self._connection.close()
            self._transport.close()
        for fd in self._connection.refused_fds():
            fd.close()

    def _drain(self) -> None:
        """Wait until storage has answered everything; for ever, unless we are told to stop: an answer that comes later
        could overwrite what the next front-end writes."""
        while True:
            try:
                limit_s = self._stop_timeout_s if self._stopping else self._drain_timeout_s
                self._rings.drain(limit_s, answer=self._open)
                return
            except DrainTimeout as error:
                log.error("%s: storage does not answer: %s", self._device.name, error)
                if self._stopping:
                    return
            except VhostUserError as error:
                log.error("%s: the rings do not stop: %s", self._device.name, error)
                return
