"""Where tables go for people. Touches: stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

FILE_WIDTH = 132
"""Columns of a table in a file or pipe, where nobody says how wide it may be."""


def console() -> Console:
    """Stdout, with nothing in the text taken for markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
