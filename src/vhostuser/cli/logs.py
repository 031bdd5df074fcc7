"""Log lines on stderr, for people or as JSON: one line each, whatever they say. Touches: stderr, the clock.

A peer can cause lines as fast as it can send messages: of lines of one kind a burst is shown.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from time import gmtime, monotonic, strftime
from typing import Final

BURST: Final = 20
"""Lines of a kind that are shown within `PERIOD_S`."""

PERIOD_S: Final = 10.0

ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(log_format: str, *, verbose: bool) -> None:
    """Sends the package's log to stderr: ``text`` or ``json``, from DEBUG on when ``verbose``, else from INFO on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(verbose=verbose) if log_format == "json" else TextFormatter(verbose=verbose))
    if not verbose:
        handler.addFilter(Damper())
    package = logging.getLogger("vhostuser")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.DEBUG if verbose else logging.INFO)


class Damper:
    """Lets through so many lines of a kind in a while: of one logger, with one text before its values are put in."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}  # since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` is shown. One that comes after others were not gets ``left_out``, their number."""
        kind = (record.name, str(record.msg))
        with self._lock:
            now = self._clock()
            since, count = self._seen.get(kind, (now, 0))
            if now - since >= PERIOD_S:
                if count > BURST:
                    record.left_out = count - BURST
                since, count = now, 0
            self._seen[kind] = (since, count + 1)
        return count < BURST


class TextFormatter(logging.Formatter):
    """`2026-11-23 20:48:52 warning vhostuser.blk: message`; a traceback follows only when ``verbose``."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__()
        self.verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, "%Y-%m-%d %H:%M:%S")
        text = f"{time} {record.levelname.lower()} {record.name}: {' '.join(record.getMessage().split())}"
        if left_out := getattr(record, "left_out", 0):
            text += f" ({left_out} more lines like this one were left out)"
        if record.exc_info and record.exc_info[1] is not None:
            if self.verbose:
                return f"{text}\n{self.formatException(record.exc_info)}"
            return f"{text}: {_in_short(record.exc_info[1])}"
        return text


class JsonFormatter(logging.Formatter):
    """One object per line: `time` (UTC, ISO 8601), `level`, `logger`, `message`, and the record's `extra`."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__()
        self.verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": f"{strftime('%Y-%m-%dT%H:%M:%S', gmtime(record.created))}.{int(record.msecs):03d}+00:00",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in vars(record).items() if key not in ORDINARY}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            entry["error"] = "".join(traceback.format_exception(error)) if self.verbose else _in_short(error)
        return json.dumps(entry, default=str)


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
