"""What native events are in the log. Touches nothing but that."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vhostuser._native import Event

log = logging.getLogger(__name__)

_KEPT: Final = {
    "request_held": (
        logging.ERROR, "queue %d: a request failed and is held (as others may be) until somebody decides: %s"
    ),
    "request_retried": (logging.WARNING, "queue %d: a request failed and is tried again (as others may be): %s"),
}  # fmt: skip


def report(name: str, event: Event) -> None:
    """Log what happened to the device called ``name``, in one line."""
    if event.kind == "requests_settled":
        log.info("%s: no failed request is kept any more: %s", name, event.reason)
    elif event.kind in _KEPT:
        level, text = _KEPT[event.kind]
        log.log(level, f"%s: {text}", name, event.index or 0, event.reason)
    else:
        what = f"ring {event.index} is broken" if event.kind == "ring_broken" else event.kind.replace("_", " ")
        log.error("%s: %s: %s", name, what, event.reason)
