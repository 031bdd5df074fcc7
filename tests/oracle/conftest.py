"""Says how much the oracle has done, and lets `make oracle` ask for more."""

from __future__ import annotations

import os

import pytest
from tests.oracle.schedule import counted


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if counted:
        parts = ", ".join(f"{count:,} {what}" for what, count in counted.items())
        terminalreporter.write_line(f"oracle: {parts}")


@pytest.fixture(scope="session")
def oracle_operations() -> int:
    """Steps of all schedules together: ORACLE_OPERATIONS, or what an ordinary run has time for."""
    return int(os.environ.get("ORACLE_OPERATIONS", "400000"))
