"""What each peer does in each case: tests hold the peers to it, and the table in the documentation is made from it.

``python -m tests.peers.table docs/reference/peers.md`` writes the page. Touches that file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from tests.peers.cases import CASES
from tests.peers.daemons import NAMES

TITLES: Final = {
    "ours": "`vhostuser serve`",
    "qsd-7.2": "storage daemon 7.2",
    "qsd-10.0": "storage daemon 10.0",
    "qsd-11.1": "storage daemon 11.1",
    "rust-vmm": "rust-vmm crates",
}

ONE_QUEUE: Final = "one queue, without MQ"
SECOND_EXPORT: Final = "a second export coming and going"


def _row(usual: str, **others: str) -> dict[str, str]:
    """The same for every peer, except for those named (with ``_`` for what a name has of ``-`` and ``.``)."""
    by_key = {name.replace("-", "_").replace(".", "_"): name for name in NAMES}
    return dict.fromkeys(NAMES, usual) | {by_key[key]: outcome for key, outcome in others.items()}


def _discard(usual: str) -> dict[str, str]:
    """The rust-vmm back-end that the tests build does not discard."""
    return _row(usual, rust_vmm="not offered")


EXPECTED: Final[dict[str, dict[str, str]]] = {
    "capacity": _row("16384 sectors"),
    "write, then read": _row("OK"),
    "write_zeroes": _row("OK"),
    "discard": _discard("OK"),
    "discard, one segment more than offered": _discard("UNSUPP"),
    "write_zeroes, one segment more than offered": _row("UNSUPP"),
    "discard, a huge number of sectors": _discard("IOERR"),
    "write_zeroes, a huge number of sectors": _row("IOERR"),
    "discard, beyond the end": _discard("IOERR"),
    "write_zeroes, beyond the end": _row("IOERR"),
    "discard, a first sector whose end overflows": _discard("IOERR"),
    "write_zeroes, a first sector whose end overflows": _row("IOERR"),
    "discard, unknown flags": _discard("UNSUPP"),
    "write_zeroes, unknown flags": _row("UNSUPP"),
    "discard, with the unmap flag": _discard("UNSUPP"),
    "merged descriptors: header and data": _row("OK"),
    "merged descriptors: data and status": _row("OK"),
    "split header": _row("OK"),
    "indirect descriptors": _row("OK"),
    "event index: calls for one request, then for two": _row("0, then 1"),
    # libvhost-user stored the number past its array of queues without looking, before QEMU 11 learned to look.
    "a queue number that the device does not have": _row(
        "refused",
        qsd_7_2="accepted",
        qsd_10_0="accepted",
        qsd_11_1="accepted, then connection closed",
        rust_vmm="refused, then connection closed",
    ),
    "eight queues": _row("MQ, 8 queues, num_queues 8"),
    ONE_QUEUE: _row("OK, MQ was offered"),
    SECOND_EXPORT: _row("OK"),
    "read beyond the end": _row("IOERR"),
    "unknown request type": _row("UNSUPP"),
    "stop, reset and start again": _row("OK"),
    "used length of a read of 4096": _row("4097"),
    "used length of a write": _row("1"),
}

HEAD: Final = """# Peers

What back-ends do with the cases of QEMU's own tests of a virtio disk (`tests/qtest`), driven by our front-end. `OK`,
`IOERR` and `UNSUPP` are the status bytes that came back. Every cell is asserted: `make interop` runs all columns, `make
test` ours.

- The first column is our back-end. The next three are `qemu-storage-daemon` of these QEMU versions, from Debian's
  packages.
- The last is a small disk made of the crates `vhost` and `vhost-user-backend` (`native/peers/rust-vmm`). What it says
  of requests is its own; what it says of messages and rings is the crates'.
- A queue number that the device does not have: libvhost-user before QEMU 11 does not check it, and writes past its
  own table. Later it acknowledges the message, and closes. The crates refuse it, and close. Our back-end refuses it and
  goes on.
- Every back-end here offers MQ with a single queue too; the driver of that row does not accept it.

"""


def page() -> str:
    """The whole page."""
    heads = ["case", *(TITLES[name] for name in NAMES)]
    lines = [heads, ["---"] * len(heads)]
    lines += [[case, *(outcomes[name] for name in NAMES)] for case, outcomes in EXPECTED.items()]
    return HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def missing() -> set[str]:
    """Cases without a row, and rows without a case."""
    return set(EXPECTED) ^ {*CASES, ONE_QUEUE, SECOND_EXPORT}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
