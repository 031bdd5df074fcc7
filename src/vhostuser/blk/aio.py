"""A disk behind any vhost-user back-end, for asyncio. Touches what `DiskLink` gives it, and its event loop.

The queues are those of the other client; here the loop watches the descriptors that the back-end calls, so that no
thread stands between an answer and who awaits it. What blocks (connecting, the configuration) runs on a thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from vhostuser.blk.client import MAX_CHANGES
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
    from vhostuser.blk.requests import Source, Target
    from vhostuser.frontend.memory import Buffer
    from vhostuser.frontend.reach import Endpoint

log = logging.getLogger(__name__)


async def connect_async(
    endpoint: Endpoint,
    *,
    queues: int = 1,
    queue_size: int = 128,
    memory: int = 64 << 20,
    copy_memory: int | None = None,
    timeout_s: float = 10.0,
    request_timeout_s: float = 30.0,
    reconnect: Backoff | None = None,
    on_config_change: ChangeListener | None = None,
    listen: bool = False,
    huge_pages: bool = False,
    features: int = USABLE_FEATURES,
    protocol_features: ProtocolFeature = MOVABLE,
) -> AsyncBlockClient:
    """Connect to a disk as `vhostuser.connect` does, with the same options, without blocking the event loop.

    ``on_config_change`` is called on the loop. Raises as `vhostuser.connect` does.
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
    path = endpoint if reconnect is None else reachable_again(endpoint)
    hearing = _Hearing(asyncio.get_running_loop(), on_config_change)
    revival = Revival(path, options, hearing.hear_elsewhere, reconnect, deliver=hearing.deliver)
    return AsyncBlockClient(await asyncio.to_thread(revival.dial), revival, hearing)


class _Hearing:
    """Takes to the loop what happens on other threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: ChangeListener | None) -> None:
        self.changes: deque[ConfigChange] = deque(maxlen=MAX_CHANGES)
        self.news = asyncio.Event()
        self._loop = loop
        self._thread = threading.current_thread()
        self._listener = listener

    def hear_elsewhere(self, change: ConfigChange) -> None:
        """On the thread of the back-end channel, or one that connects."""
        try:
            self._loop.call_soon_threadsafe(self.hear, change)
        except RuntimeError:  # the loop is closed: nobody can hear it
            log.debug("a changed configuration came too late")

    def deliver(self, task: Callable[[], None]) -> None:
        """Run ``task`` on the loop: at once, if that is here."""
        if threading.current_thread() is self._thread:
            task()
            return
        try:
            self._loop.call_soon_threadsafe(task)
        except RuntimeError:  # the loop is closed: nobody waits
            log.debug("the end of a request came too late")

    def hear(self, change: ConfigChange) -> None:
        """On the loop."""
        self.changes.append(change)
        self.news.set()
        if self._listener is not None:
            self._listener(change)


class AsyncBlockClient(DiskFacts):
    """A disk, for the tasks of one event loop. Everything that `BlockClient` says of requests and buffers holds here.

    Made by `connect_async`. A task that is cancelled leaves its request behind: its buffers stay in use until the
    device has answered.
    """

    def __init__(self, link: DiskLink, revival: Revival, hearing: _Hearing) -> None:
        """Takes ``link``."""
        super().__init__(link)
        self._revival = revival
        self._hearing = hearing
        self._loop = asyncio.get_running_loop()
        self._closing = threading.Event()
        self._over: VhostUserError | None = None
        self._stepped = asyncio.Event()  # set after each step, and when a link is made or given up
        self._timer: asyncio.TimerHandle | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._moving = asyncio.Lock()
        self._move_task: asyncio.Task[Migration] | None = None
        self._watch()

    @property
    def connected(self) -> bool:
        """Whether the back-end is there."""
        return not self._closing.is_set() and self._link.connected

    async def allocate(self, length: int) -> Buffer:
        """A buffer that the back-end reads and writes in place: see `BlockClient.allocate`."""
        return (await self._usable()).allocate(length)

    async def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        data: bytes = await self._do(Read(offset, length))
        return data

    async def readinto(self, offset: int, buffer: Target | Sequence[Target]) -> None:
        """Fill ``buffer``, or several in turn, from ``offset`` on."""
        await self._do(ReadInto(offset, buffer))

    async def write(self, offset: int, data: Source | Sequence[Source]) -> None:
        """Write ``data``, or several in turn, from ``offset`` on. It is durable after the next `flush`."""
        await self._do(Write(offset, data))

    async def flush(self) -> None:
        """Make every write durable that was answered before. Does nothing when the disk has no volatile cache."""
        await self._do(Flush())

    async def discard(self, offset: int, length: int) -> None:
        """Let the storage of ``length`` bytes be given back; they read as anything afterwards."""
        await self._do(Discard(offset, length))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make ``length`` bytes read as zeroes; with ``unmap`` their storage may be given back."""
        await self._do(WriteZeroes(offset, length, unmap))

    async def get_id(self) -> str:
        """The serial of the disk, up to 20 characters."""
        answer: bytes = await self._do(GetId())
        return serial_of(answer)

    def submit(self, request: Request, *, queue: int | None = None) -> asyncio.Future[Any]:
        """Begin ``request`` and return the future of its result: see `BlockClient.submit`. On the loop.

        Does not wait for a reconnection, as the coroutines do, but raises why the client is not connected.
        """
        return self.submit_all((request,), queue=queue)[0]

    def submit_all(self, requests: Iterable[Request], *, queue: int | None = None) -> list[asyncio.Future[Any]]:
        """Begin all ``requests`` with one notification of the back-end: see `BlockClient.submit_all`. On the loop."""
        wanted = list(requests)
        link = self._good()
        futures: list[asyncio.Future[Any]] = [self._loop.create_future() for _ in wanted]
        link.submit(link.jobs(wanted, futures), self._lane(link, queue))
        return futures

    async def set_write_cache(self, enabled: bool) -> None:
        """Switch the volatile write cache of the disk on or off. Raises `ConfigRefused` when it cannot be."""
        link = await self._usable(connected=True)
        await asyncio.to_thread(switch_write_cache, link, enabled=enabled)

    async def refresh(self) -> None:
        """Read the configuration again, for back-ends that cannot tell when it changes."""
        await asyncio.to_thread((await self._usable(connected=True)).refresh)

    async def migrate(
        self,
        destination: Endpoint,
        *,
        rounds: int = 4,
        round_s: float = 0.02,
        swap_log: bool = False,
        leave: bool = True,
        strict: bool = True,
    ) -> Migration:
        """Move the disk to the back-end at ``destination`` while it is used: see `BlockClient.migrate`."""
        place = self._revival.place(destination)
        manner = Manner(rounds=rounds, round_s=round_s, swap_log=swap_log, leave=leave, strict=strict)
        # Who waits for it may be cancelled; what was begun is brought to its end.
        self._move_task = self._loop.create_task(self._move(place, manner))
        return await asyncio.shield(self._move_task)

    async def wait_config_change(self) -> ConfigChange:
        """The next change of the configuration that was not waited for yet. Raises what ended the connection."""
        hearing = self._hearing
        while not hearing.changes:
            hearing.news.clear()
            if self._closing.is_set():
                raise SetupError("the client is closed")
            if self._over is not None:
                raise again(self._over)
            await hearing.news.wait()
        return hearing.changes.popleft()

    async def close(self) -> None:
        """Wait until everything under way is answered, stop the queues, hang up. Idempotent.

        While the back-end is away nothing is waited for: what is under way fails.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._hearing.news.set()
        self._stepped.set()
        self._revival.interrupt()
        if self._reviving is not None:
            await self._reviving
        async with self._moving:
            pass
        link = self._link
        while link.connected and not link.idle:
            self._stepped.clear()
            await self._stepped.wait()
        self._unwatch()
        await asyncio.to_thread(bury, link)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _usable(self, *, connected: bool = False) -> DiskLink:
        """The link, once there is one that takes requests, or whose back-end is there. Raises why there is none."""
        try:
            async with asyncio.timeout(self._link.options.request_timeout_s):
                while self._reviving is not None and not self._closing.is_set():
                    if self._link.connected or (self._link.error is None and not connected):
                        break
                    self._stepped.clear()
                    await self._stepped.wait()
        except TimeoutError:
            raise late(self._link) from None
        return self._good()

    def _good(self) -> DiskLink:
        if self._closing.is_set():
            raise SetupError("the client is closed")
        if self._link.error is not None:
            raise again(self._over or self._link.error)
        return self._link

    async def _do(self, request: Request) -> Any:
        if self._link.error is not None:
            await self._usable()
        return await self.submit(request)

    def _watch(self) -> None:
        self._loop.add_reader(self._link.fileno(), self._step)
        self._set_timer()

    async def _move(self, place: Endpoint, manner: Manner) -> Migration:
        """One attempt. What blocks runs on a thread, and nobody steps the link while that switches it."""
        async with self._moving:
            move = Move(await self._usable(connected=True), place, manner, closing=self._closing)
            try:
                await asyncio.to_thread(move.prepare)
                move.pause()
                while move.drains and not move.drained and not self._closing.is_set():
                    self._stepped.clear()
                    await self._stepped.wait()
                if self._reviving is not None or self._timer is None:
                    raise again(self._link.error or self._link.away or PeerGone("the source of the migration has gone"))
                self._unwatch()
                try:
                    migration = await asyncio.to_thread(move.switch)
                    self._revival.moved(place)
                    return migration
                finally:
                    self._watch()
            finally:
                move.end()

    def _set_timer(self) -> None:
        self._timer = self._loop.call_later(self._link.patience(), self._look)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._loop.remove_reader(self._link.fileno())

    def _look(self) -> None:
        """Nothing may have come for as long as a request may take."""
        self._step()
        if self._timer is not None:
            self._set_timer()

    def _step(self) -> None:
        alive = self._link.step()
        self._stepped.set()
        if alive or self._timer is None:
            return
        self._unwatch()
        if self._revival.wanted and not self._closing.is_set():
            self._reviving = self._loop.create_task(self._revive(self._link))
        else:
            self._give_up(self._link.error or PeerGone("the back-end has gone"))

    async def _revive(self, old: DiskLink) -> None:
        """Connect again, until that succeeds or the back-off gives up."""
        try:
            link = await asyncio.to_thread(self._revival.revive, old)
        except VhostUserError as error:
            self._give_up(error)
            return
        finally:
            self._reviving = None
        if link is not None:
            if link is not old:
                self._copied_before += old.copied_bytes
            self._link = link
            self._watch()
            if link.config != old.config:
                self._hearing.hear(ConfigChange(old.config, link.config))
        self._stepped.set()

    def _give_up(self, error: VhostUserError) -> None:
        self._over = error
        self._hearing.news.set()
        self._stepped.set()
