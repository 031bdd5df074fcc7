"""A disk behind any vhost-user back-end, for threads. Touches what `DiskLink` gives it, and one thread.

One thread per client takes the answers (the reaper), whoever asked. It costs a change of threads for each call that
waits. In return a future completes although nobody waits for it, a back-end that hangs up or says nothing is noticed
at once and by all, and calls of many threads never wait for each other's. Who needs more keeps many requests in the
ring, or uses the native load loop.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from vhostuser.blk.errands import Errands
from vhostuser.blk.facts import DiskFacts, serial_of, switch_write_cache
from vhostuser.blk.link import DiskLink
from vhostuser.blk.migration import Manner, Migration, Move
from vhostuser.blk.options import USABLE_FEATURES, ChangeListener, ConfigChange, Options
from vhostuser.blk.requests import Discard, Flush, GetId, Read, ReadInto, Request, Write, WriteZeroes
from vhostuser.blk.revival import Revival, bury, late
from vhostuser.errors import PeerGone, SetupError, VhostUserError
from vhostuser.frontend.dialogue import again
from vhostuser.frontend.negotiated import MOVABLE
from vhostuser.frontend.reach import reachable_again
from vhostuser.frontend.reconnect import Backoff
from vhostuser.protocol import ProtocolFeature

if TYPE_CHECKING:
    from vhostuser.blk.fileobj import DiskFile
    from vhostuser.blk.requests import Source, Target
    from vhostuser.frontend.memory import Buffer
    from vhostuser.frontend.reach import Endpoint

T = TypeVar("T")

MAX_CHANGES: Final = 1024

log = logging.getLogger(__name__)


def connect(
    endpoint: Endpoint,
    *,
    queues: int = 1,
    queue_size: int = 128,
    memory: int = 64 << 20,
    copy_memory: int | None = None,
    per_thread: bool = False,
    timeout_s: float = 10.0,
    request_timeout_s: float = 30.0,
    reconnect: Backoff | None = None,
    on_config_change: ChangeListener | None = None,
    listen: bool = False,
    huge_pages: bool = False,
    features: int = USABLE_FEATURES,
    protocol_features: ProtocolFeature = MOVABLE,
) -> BlockClient:
    """Connect to the disk at ``endpoint``: the path of its socket (``@name`` for an abstract one), or an inherited
    descriptor or a `Transport`, which is taken over. Blocks until it can be used.

    ``queues`` of ``queue_size`` descriptors each (a power of two from 4 on) carry the requests, in turn; with
    ``per_thread`` every thread keeps to one of them. ``memory`` bytes are for buffers of `BlockClient.allocate`,
    ``copy_memory`` bytes of each queue for data that is copied (by default 16 KiB per descriptor, 4 MiB at least).
    ``timeout_s`` bounds the connection and every message on the socket, ``request_timeout_s`` every request: a back-end
    that takes longer counts as gone. ``on_config_change`` is called, on another thread, when the configuration changes.
    ``listen``: be the server and wait for the back-end. ``huge_pages``: take the memory from the system's reserve of
    them. ``features`` and ``protocol_features``: use no others than these.

    With ``reconnect`` a new connection is made when the back-end has gone. If it offers in-flight tracking
    (INFLIGHT_SHMFD) no call notices but by the time it takes: requests under way, and those that are made meanwhile,
    are answered by the back-end that comes, none is sent twice, and buffers stay. The clocks of ``request_timeout_s``
    stand still meanwhile and begin anew; it is ``reconnect`` that bounds the outage, and a back-end that is lost again
    before it answered anything prolongs it. Calls fail as below when nobody comes in that time, when who comes offers
    less than was there before, when a ring is broken, and when a back-end that is there takes too long for a request.
    Without in-flight tracking every loss fails what is under way, once; later calls wait for the new connection,
    ``request_timeout_s`` at most.

    Raises `BackendUnfit` when the back-end cannot be driven, `OperatorError` when there is none, `SetupError` for
    options that make no sense, and `PeerGone` or `RemoteProtocolError` for a back-end that is silent or broken.
    """
    options = Options(
        queues=queues,
        queue_size=queue_size,
        memory=memory,
        copy_memory=copy_memory,
        timeout_s=timeout_s,
        request_timeout_s=request_timeout_s,
        listen=listen,
        huge_pages=huge_pages,
        features=features,
        protocol_features=protocol_features if reconnect else protocol_features & ~ProtocolFeature.INFLIGHT_SHMFD,
    )
    return BlockClient(endpoint, options, per_thread=per_thread, reconnect=reconnect, on_config_change=on_config_change)


class BlockClient(DiskFacts):
    """A disk. Every method may be called from any thread, at the same time.

    Offsets and lengths are in bytes and whole blocks of `block_size`; anything else is a `RequestRefused` before a
    byte is sent. What is larger than the disk takes at once is sent in parts; if one fails the others may have been
    carried out. A request that the device fails raises `RequestFailed`, an `OSError`. When the back-end breaks, falls
    silent or goes away, every call under way raises `RemoteRingError`, `RemoteProtocolError` or `PeerGone`, once, and
    so does every later one unless the client reconnects: see `connect`. A failed write may or may not have happened.

    Buffers belong to the request until it is done. Those of `allocate` are used in place; all others are copied, which
    `copied_bytes` counts. `submit` never blocks for room: what does not fit into the ring waits in its order.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        options: Options,
        *,
        per_thread: bool = False,
        reconnect: Backoff | None = None,
        on_config_change: ChangeListener | None = None,
    ) -> None:
        """See `connect`."""
        again_at = endpoint if reconnect is None else reachable_again(endpoint)
        self._revival = Revival(again_at, options, self._hear, reconnect)
        self._errands = Errands()  # of the reaper
        self._moving = threading.Lock()
        self._per_thread = threading.local() if per_thread else None
        self._listener = on_config_change
        self._telling: threading.Thread | None = None
        self._state = threading.Condition()  # guards the members below; notified after each step of the reaper
        self._changes: deque[ConfigChange] = deque(maxlen=MAX_CHANGES)
        self._closing = threading.Event()
        self._over: VhostUserError | None = None  # there is no link, and will be none
        super().__init__(self._revival.dial())
        self._reaper = threading.Thread(target=self._reap, name=f"disk {self._link.name}", daemon=True)
        self._reaper.start()

    @property
    def connected(self) -> bool:
        """Whether the back-end is there."""
        return not self._closing.is_set() and self._link.connected

    def allocate(self, length: int) -> Buffer:
        """A buffer that the back-end reads and writes in place. Release it, or use ``with``.

        It is of use until calls fail because the connection has ended: allocate anew then. Raises `SetupError` when
        what is left of ``memory`` has no ``length`` bytes in one piece.
        """
        return self._usable().allocate(length)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        return self._wait(Read(offset, length), bytes)

    def readinto(self, offset: int, buffer: Target | Sequence[Target]) -> None:
        """Fill ``buffer``, or several in turn, from ``offset`` on."""
        self.submit(ReadInto(offset, buffer)).result()

    def write(self, offset: int, data: Source | Sequence[Source]) -> None:
        """Write ``data``, or several in turn, from ``offset`` on. It is durable after the next `flush`."""
        self.submit(Write(offset, data)).result()

    def flush(self) -> None:
        """Make every write durable that was answered before. Does nothing when the disk has no volatile cache."""
        self.submit(Flush()).result()

    def discard(self, offset: int, length: int) -> None:
        """Let the storage of ``length`` bytes be given back; they read as anything afterwards."""
        self.submit(Discard(offset, length)).result()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make ``length`` bytes read as zeroes; with ``unmap`` their storage may be given back."""
        self.submit(WriteZeroes(offset, length, unmap)).result()

    def get_id(self) -> str:
        """The serial of the disk, up to 20 characters."""
        return serial_of(self._wait(GetId(), bytes))

    def submit(self, request: Request, *, queue: int | None = None) -> Future[Any]:
        """Begin ``request`` and return the future of its result: `bytes` of `Read` and `GetId`, None of the others.

        ``queue`` chooses one. It cannot be cancelled. Raises `RequestRefused` at once for what cannot be asked.
        """
        return self.submit_all((request,), queue=queue)[0]

    def submit_all(self, requests: Iterable[Request], *, queue: int | None = None) -> list[Future[Any]]:
        """Begin all ``requests`` with one notification of the back-end, on one queue; the futures are in their order.

        They may be carried out in any order, and at the same time. Raises as `submit`; nothing is begun then.
        """
        wanted = list(requests)
        link = self._usable()
        futures: list[Future[Any]] = [Future() for _ in wanted]
        for future in futures:
            future.set_running_or_notify_cancel()
        link.submit(link.jobs(wanted, futures), self._lane(link, queue))
        return futures

    def set_write_cache(self, enabled: bool) -> None:
        """Switch the volatile write cache of the disk on or off. Raises `ConfigRefused` when it cannot be."""
        switch_write_cache(self._connected(), enabled=enabled)

    def refresh(self) -> None:
        """Read the configuration again, for back-ends that cannot tell when it changes."""
        self._connected().refresh()

    def wait_config_change(self, timeout_s: float | None = None) -> ConfigChange | None:
        """The next change of the configuration that was not waited for yet.

        None when ``timeout_s`` pass without one, or the client is closed. Raises what ended the connection.
        """
        with self._state:
            self._state.wait_for(lambda: self._changes or self._over or self._closing.is_set(), timeout_s)
            if self._changes:
                return self._changes.popleft()
            if self._over is not None and not self._closing.is_set():
                raise again(self._over)
            return None

    def migrate(
        self,
        destination: Endpoint,
        *,
        rounds: int = 4,
        round_s: float = 0.02,
        swap_log: bool = False,
        leave: bool = True,
        strict: bool = True,
    ) -> Migration:
        """Move the disk to the back-end at ``destination`` while it is used: `Migration` says what that took. Blocks.

        Both back-ends have to serve the same storage. Calls go on all the time but the downtime: those that are under
        way then are answered by the one or the other back-end, none twice. Buffers stay. The memory is copied in
        ``rounds`` meanwhile, each after ``round_s`` seconds, as a hypervisor does it, with the same log or, with
        ``swap_log``, a new one each time; what the back-end logged must be all that it wrote. ``leave``: requests that
        storage has not got yet are left for the destination, if both know how; else the source answers all.

        Raises `MigrationFailed` when the disk stays where it is: the destination does not fit or refuses, or the source
        forgot to log something. Without ``strict`` that is only told. Raises what broke the source if it broke.
        """
        if threading.current_thread() in (self._reaper, self._telling) or self._link.serving:
            raise SetupError("a callback cannot move the disk of the client that it was called by")
        place = self._revival.place(destination)
        with self._moving:
            manner = Manner(rounds=rounds, round_s=round_s, swap_log=swap_log, leave=leave, strict=strict)
            move = Move(self._connected(), place, manner, closing=self._closing)
            try:
                move.prepare()
                move.pause()
                with self._state:
                    self._state.wait_for(lambda: not move.drains or move.drained or self._closing.is_set())
                switched = self._errands.hand_in(move.switch)
                self._link.wake()
                migration = switched.result()
                self._revival.moved(place)
                return migration
            finally:
                move.end()

    def file(self) -> DiskFile:
        """The disk as a raw file, of single bytes. The client stays open when it is closed."""
        from vhostuser.blk.fileobj import DiskFile

        return DiskFile(self)

    def close(self) -> None:
        """Wait until everything under way is answered, stop the queues, hang up. Idempotent.

        While the back-end is away nothing is waited for: what is under way fails. Raises `SetupError` when called by a
        callback of a future or of the configuration.
        """
        if threading.current_thread() in (self._reaper, self._telling) or self._link.serving:
            raise SetupError("a callback cannot close the client that it was called by")
        with self._state:
            self._closing.set()
            self._state.notify_all()
        self._revival.interrupt()
        self._link.wake()
        self._reaper.join()
        if self._telling is not None:
            self._telling.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _wait(self, request: Request, kind: type[T]) -> T:
        return cast(T, self.submit(request).result())

    def _usable(self) -> DiskLink:
        """The link, once there is one that takes requests. Raises why there is none."""
        link = self._link
        if link.error is None and not self._closing.is_set():
            return link
        return self._wait_for(lambda link: link.error is None)

    def _connected(self) -> DiskLink:
        """The link, once the back-end is there."""
        return self._wait_for(lambda link: link.connected)

    def _wait_for(self, good: Callable[[DiskLink], bool]) -> DiskLink:
        """Raises `PeerGone` when that takes longer than a request may, unless something else is wrong."""
        with self._state:
            if self._revival.wanted and threading.current_thread() is not self._reaper:
                self._state.wait_for(
                    lambda: good(self._link) or self._over or self._closing.is_set(),
                    self._link.options.request_timeout_s,
                )
            link = self._link
            if self._closing.is_set():
                raise SetupError("the client is closed")
            if good(link):
                return link
            if self._over is None and self._revival.wanted:
                raise late(link)
            raise again(self._over or link.error or PeerGone("the back-end has gone"))

    def _next_turn(self) -> int:
        """In turn for each request, or once for each thread."""
        if self._per_thread is None:
            return next(self._turn)
        turn: int | None = getattr(self._per_thread, "turn", None)
        if turn is None:
            turn = self._per_thread.turn = next(self._turn)
        return turn

    def _hear(self, change: ConfigChange) -> None:
        with self._state:
            self._changes.append(change)
            self._state.notify_all()
        if self._listener is None:
            return
        if threading.current_thread() is not self._reaper:
            self._listener(change)
            return
        # The listener may ask for something, and the reaper is who would have to answer that.
        tell = _Telling(self._listener, change, self._telling)
        self._telling = threading.Thread(target=tell, name="disk listener", daemon=True)
        self._telling.start()

    def _reap(self) -> None:
        """Take answers until the client is closed, or the back-end has gone for good."""
        while True:
            link = self._link
            link.step(link.patience())
            self._errands.run()
            alive = link.connected
            with self._state:
                self._state.notify_all()
            if self._closing.is_set() and (link.idle or not alive):
                break
            if not alive and not self._revive(link):
                break
        self._errands.refuse(self._over or PeerGone("the client is closed"))
        bury(self._link)
        with self._state:
            self._over = self._over or self._link.error
            self._state.notify_all()

    def _revive(self, old: DiskLink) -> bool:
        """Connect again, if that is wanted. False when there will be no connection any more."""
        try:
            link = self._revival.revive(old)
        except VhostUserError as error:
            self._over = error
            return False
        if link is None:
            return False
        with self._state:
            if link is not old:
                self._copied_before += old.copied_bytes
            self._link = link
            self._state.notify_all()
        if link.config != old.config:
            self._hear(ConfigChange(old.config, link.config))
        return True


class _Telling:
    """Tells a listener of one change, after the one before."""

    def __init__(self, listener: ChangeListener, change: ConfigChange, before: threading.Thread | None) -> None:
        self._listener = listener
        self._change = change
        self._before = before

    def __call__(self) -> None:
        if self._before is not None:
            self._before.join()
        try:
            self._listener(self._change)
        except Exception:
            log.exception("an error in what was to hear of a changed configuration")
