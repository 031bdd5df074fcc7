"""The inputs that every run starts with, one per line in base64. Touches the files in ``seeds``."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Final

SEEDS: Final = Path(__file__).parent / "seeds"


def seeds_of(target: str) -> list[bytes]:
    """The inputs kept for ``target``."""
    return [base64.b64decode(line) for line in (SEEDS / f"{target}.txt").read_text().split()]


def write_seeds(target: str, inputs: list[bytes]) -> None:
    """Keeps ``inputs`` for ``target`` instead of what was there."""
    lines = sorted(base64.b64encode(data).decode() for data in inputs)
    (SEEDS / f"{target}.txt").write_text("".join(f"{line}\n" for line in lines))
