"""The inputs that every run starts with, one per line in base64, and conversations of real front-ends.

Touches the files in ``seeds`` and ``conversations``.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Final

SEEDS: Final = Path(__file__).parent / "seeds"
CONVERSATIONS: Final = Path(__file__).parent / "conversations"

KINDS: Final = ("memory", "event", "region", "socket", "other")
"""The kinds of descriptors in a conversation."""

RECORDED: Final = 250
"""The byte before a recorded message in an input of the session; see `recorded`."""


def conversations() -> dict[str, list[tuple[bytes, list[str]]]]:
    """What was recorded: the messages of each conversation, with the kinds of their descriptors."""
    found = {}
    for path in sorted(CONVERSATIONS.glob("*.txt")):
        lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
        found[path.stem] = [(bytes.fromhex(data), kinds.replace("-", "").split(",")) for data, kinds in lines]
    return found


def recorded(messages: list[tuple[bytes, list[str]]]) -> bytes:
    """An input of the session that says these messages."""
    parts = []
    for data, kinds in messages:
        places = bytes(KINDS.index(kind) for kind in kinds if kind)
        parts.append(bytes((RECORDED, *len(data).to_bytes(2, "little"))) + data + bytes((len(places),)) + places)
    return b"".join(parts)


def seeds_of(target: str) -> list[bytes]:
    """The inputs kept for ``target``; the session's begin with the conversations."""
    spoken = [recorded(messages) for messages in conversations().values()] if target == "session" else []
    return spoken + [base64.b64decode(line) for line in (SEEDS / f"{target}.txt").read_text().split()]


def write_seeds(target: str, inputs: list[bytes]) -> None:
    """Keeps ``inputs`` for ``target`` instead of what was there."""
    lines = sorted(base64.b64encode(data).decode() for data in inputs)
    (SEEDS / f"{target}.txt").write_text("".join(f"{line}\n" for line in lines))
