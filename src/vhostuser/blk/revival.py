"""How a client gets back to its disk after its back-end has gone. Touches the links it makes, and blocks.

The link that is away goes on if it can; if it cannot, what was under way fails, and there is a new one.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from vhostuser.blk.link import Deliver, DiskLink
from vhostuser.errors import BackendUnfit, PeerGone, VhostUserError
from vhostuser.frontend.reach import reachable_again
from vhostuser.frontend.reconnect import Backoff, Outages, try_again

if TYPE_CHECKING:
    from vhostuser.blk.options import ChangeListener, Options
    from vhostuser.frontend.reach import Endpoint

log = logging.getLogger(__name__)


class Revival:
    """Makes the first link of a client, and the later ones. One thread at a time, but `interrupt`."""

    def __init__(
        self,
        endpoint: Endpoint,
        options: Options,
        changed: ChangeListener,
        backoff: Backoff | None,
        *,
        deliver: Deliver | None = None,
    ) -> None:
        """``backoff`` None: there is only one link. The others are arguments of `DiskLink`."""
        self.wanted: Final = backoff is not None
        self._endpoint = endpoint
        self._options = options
        self._changed = changed
        self._deliver = deliver
        self._backoff = backoff
        self._outages = None if backoff is None else Outages(backoff)
        self._stop = threading.Event()
        self._under_way: DiskLink | None = None

    def place(self, endpoint: Endpoint) -> Endpoint:
        """``endpoint``, if a disk may move there. Raises `UsageError` where it has to be found again, and cannot be."""
        return reachable_again(endpoint) if self.wanted else endpoint

    def moved(self, endpoint: Endpoint) -> None:
        """Later links are made there."""
        self._endpoint = endpoint

    def dial(self) -> DiskLink:
        """Connect anew. Raises what `DiskLink.open` does."""
        link = DiskLink(self._endpoint, self._options, self._changed, deliver=self._deliver)
        self._under_way = link
        try:
            if self._stop.is_set():
                link.give_up()
            link.open()
        finally:
            self._under_way = None
        return link

    def revive(self, old: DiskLink) -> DiskLink | None:
        """A link in place of ``old``: that itself, if the back-end that came goes on with it; else it is closed.

        Blocks. None when interrupted. Raises why there will be no connection any more; all requests have failed then.
        """
        reason = old.error or old.away or PeerGone("the back-end has gone")
        if self._outages is None or self._backoff is None:
            raise reason
        kept = f", {sum(lane.outstanding for lane in old.lanes)} requests kept" if old.error is None else ""
        log.warning("%s: %s; connecting again%s", old.name, str(reason), kept)  # a kept record keeps no arena
        if old.error is not None:
            old.close(wait=False)
        answered = old.answered
        try:
            link = try_again(lambda: self._attempt(old), self._outages.waits(answered), self._stop, reason)
        except VhostUserError as error:
            if old.error is None:
                lost = f"no back-end went on with it within {self._backoff.give_up_s:g} s: {error}"
                old.fail(PeerGone(lost))
            raise
        if link is not None:
            self._outages.over(link.answered)
        return link

    def _attempt(self, old: DiskLink) -> DiskLink:
        if old.error is None:
            self._under_way = old
            try:
                if self._stop.is_set():
                    raise PeerGone("the client is closed")
                old.resume()
            except BackendUnfit as error:
                log.warning("%s Requests under way fail.", error)
                old.fail(error)
                old.close(wait=False)
            else:
                return old
            finally:
                self._under_way = None
        return self.dial()

    def interrupt(self) -> None:
        """Make `dial` and `revive` end at once, now and for ever. Any thread."""
        self._stop.set()
        if (link := self._under_way) is not None:
            link.give_up()


def bury(link: DiskLink) -> None:
    """End ``link`` for good: in order, if it is connected. Blocks."""
    if link.away is not None:
        link.fail(PeerGone(f"the client was closed while its back-end was away: {link.away}"))
    if link.error is None:
        try:
            link.stop()
        except VhostUserError as error:
            log.warning("%s: the disk did not stop in order: %s", link.name, error)
    link.close()


def late(link: DiskLink) -> PeerGone:
    """The error of a call that waited for a connection in vain."""
    waited = link.options.request_timeout_s
    return PeerGone(f"the back-end did not come again within {waited:g} s: {link.error or link.away}")
