"""The state of a device, taken out of one back-end and put into another. Touches one dialogue and the pipes it makes.

What is in it is between back-ends of one kind (vhost-user: Migrating back-end state); here it is bytes. They go over a
pipe, beside the socket, and CHECK_DEVICE_STATE says afterwards whether they arrived.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from typing import Final, NoReturn

from vhostuser.errors import BackendRefused, BackendUnfit, PeerGone, RemoteProtocolError
from vhostuser.fds import Fd
from vhostuser.frontend.negotiated import Life, Negotiated
from vhostuser.protocol import (
    U64,
    DeviceStateParams,
    DeviceStateReply,
    Direction,
    FrontendRequest,
    Phase,
    ProtocolFeature,
)

Req = FrontendRequest

CHUNK: Final = 1 << 20
"""How much is read or written at once, in bytes: as QEMU."""

MAX_STATE: Final = 1 << 30
"""A back-end that sends more, in bytes, is given up: it may never end."""


class Stateful(Negotiated):
    """The part of `HostDevice` that moves the state of its back-end. For the thread of the life cycle.

    Only while all rings are stopped: what is saved is of that moment, and loading is for a device that has not run yet.
    """

    def check_state(self) -> None:
        """Raise `BackendUnfit` when the back-end cannot give its state away, nor take one."""
        if ProtocolFeature.DEVICE_STATE not in self.protocol_features:
            offered = ProtocolFeature.DEVICE_STATE in self.protocol_features_offered
            cause = "DEVICE_STATE was not negotiated with it" if offered else "it does not offer DEVICE_STATE"
            raise BackendUnfit(self.name, cause, "Ask for it: see MOVABLE" if offered else "Do without its state")

    def save_state(self, *, timeout_s: float | None = None) -> bytes:
        """The state of the device; empty for one that has none. The device can go on afterwards, or not.

        Blocks until the back-end has sent it all, ``timeout_s`` at most, or as long as an answer may take. Raises
        `BackendRefused` when it says that it failed, `PeerGone` when it takes too long: the connection is over then.
        """
        with self._transfer(Direction.SAVE) as ours:
            state = self._read(ours, self._deadline(timeout_s))
        self._check_state()
        return state

    def load_state(self, state: bytes, *, timeout_s: float | None = None) -> None:
        """Put the ``state`` of another device into this one, which is realized and has not been started.

        Blocks until the back-end has taken it all and looked at it. Raises `BackendRefused` when it does not want it:
        the connection is of no further use then, since nobody knows what it has made of the first half.
        """
        with self._transfer(Direction.LOAD) as ours, suppress(BrokenPipeError):
            # One that wants no more says in its answer to the next question why, or that it is enough.
            self._write(ours, state, self._deadline(timeout_s))
        self._check_state()

    def _read(self, fd: Fd, deadline: float) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            self._wait(fd, select.POLLIN, deadline)
            chunk = os.read(fd.fileno(), CHUNK)
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_STATE:
                self._give_up(RemoteProtocolError(f"the back-end sends more than {MAX_STATE} bytes of device state"))

    def _write(self, fd: Fd, state: bytes, deadline: float) -> None:
        left = memoryview(state)
        while left:
            self._wait(fd, select.POLLOUT, deadline)
            left = left[os.write(fd.fileno(), left[:CHUNK]) :]

    def _wait(self, fd: Fd, event: int, deadline: float) -> None:
        """Until something can be moved, or the other end is closed."""
        poll = select.poll()
        poll.register(fd.fileno(), event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            self._give_up(PeerGone("the back-end did not move its state within the time limit"))

    def _give_up(self, error: PeerGone | RemoteProtocolError) -> NoReturn:
        """Neither side knows any more what the other one means: nothing can be asked after that."""
        self.dialogue.fail(error)
        raise error

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self.dialogue.timeout_s if timeout_s is None else timeout_s)

    def _transfer(self, direction: Direction) -> Fd:
        """SET_DEVICE_STATE_FD: our end of a pipe, or what the back-end would rather use."""
        self._expect(Life.REALIZED)
        self.check_state()
        ends = [Fd(end) for end in os.pipe2(os.O_CLOEXEC)]
        ours, theirs = ends if direction is Direction.SAVE else reversed(ends)
        try:
            with theirs:
                reply = self.dialogue.ask(
                    Req.SET_DEVICE_STATE_FD, DeviceStateParams(direction, Phase.STOPPED), [theirs]
                )
            answer = reply.payload
            if not isinstance(answer, DeviceStateReply) or answer.error:
                raise BackendRefused("SET_DEVICE_STATE_FD", answer.error if isinstance(answer, DeviceStateReply) else 1)
            if reply.fds:
                ours.close()
                (ours,) = reply.fds
            if direction is Direction.LOAD:
                os.set_blocking(ours.fileno(), False)  # a pipe takes a part of what it has room for
        except BaseException:
            ours.close()
            raise
        return ours

    def _check_state(self) -> None:
        answer = self.dialogue.ask(Req.CHECK_DEVICE_STATE).payload
        if not isinstance(answer, U64) or answer.value:
            raise BackendRefused("CHECK_DEVICE_STATE", answer.value if isinstance(answer, U64) else 1)
