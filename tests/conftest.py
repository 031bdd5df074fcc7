"""For all tests: which rows of the conformance table were proved by a test that passed, kept in `build/covers.json`.

A test names its rows with ``@pytest.mark.covers("ROW", ...)``; `docs/conformance.py` refuses a claimed row that no
passed test names. Runs add to the file, since the ordinary run, `make guest` and `make interop` each prove their part;
a test that ran and did not pass loses its entry.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COVERS_PATH = ROOT / "build" / "covers.json"

outcomes = pytest.StashKey[dict[str, bool]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[outcomes] = {}
    # A shell that starts us in the background has it ignored, and so would every program that the tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test passed when its call passed and neither its set-up nor its tear-down failed."""
    report = yield
    seen = item.config.stash[outcomes]
    if report.when == "call":
        seen[item.nodeid] = report.passed
    elif not report.passed:
        seen[item.nodeid] = False
    return report


def rows_of(item: pytest.Item) -> list[str]:
    """The rows that a test says it proves."""
    return sorted({str(row) for mark in item.iter_markers("covers") for row in mark.args})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Merges this run into the file: identifier of a test -> the rows it proves."""
    seen = session.config.stash[outcomes]
    if not seen:
        return
    covers: dict[str, list[str]] = json.loads(COVERS_PATH.read_text()) if COVERS_PATH.exists() else {}
    covers = {test: rows for test, rows in covers.items() if test not in seen and (ROOT / test.split("::")[0]).exists()}
    for item in session.items:
        if seen.get(item.nodeid) and rows_of(item):
            covers[item.nodeid] = rows_of(item)
    COVERS_PATH.parent.mkdir(exist_ok=True)
    COVERS_PATH.write_text(json.dumps(covers, indent=1, sort_keys=True) + "\n")
