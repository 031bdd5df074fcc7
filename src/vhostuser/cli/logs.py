"""Log lines on stderr, for people or as JSON: one line each, whatever they say. Touches: stderr, the clock."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from time import gmtime, strftime

ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(log_format: str, *, verbose: bool) -> None:
    """Sends the package's log to stderr: ``text`` or ``json``, from DEBUG on when ``verbose``, else from INFO on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(verbose=verbose) if log_format == "json" else TextFormatter(verbose=verbose))
    package = logging.getLogger("vhostuser")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.DEBUG if verbose else logging.INFO)


class TextFormatter(logging.Formatter):
    """`2026-11-23 20:48:52 warning vhostuser.blk: message`; a traceback follows only when ``verbose``."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__()
        self.verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, "%Y-%m-%d %H:%M:%S")
        text = f"{time} {record.levelname.lower()} {record.name}: {' '.join(record.getMessage().split())}"
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
