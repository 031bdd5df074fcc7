"""Instructions per request, counted and held against a record: ``python -m benchmarks.instructions``.

`native/count` sends a fixed number of requests through a ring in one thread; valgrind's callgrind counts what each half
of it executes. The same build gives the same numbers, so that a rise is a change of the code or of the compiler, and
the record has a section for each compiler. Exits with 1 when a half has risen by more than `LIMIT`, or when there is
no record to compare with. Touches: processes, a temporary directory, `native/count/recorded.toml`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).resolve().parent.parent / "native"
PROGRAM = NATIVE / "target/release/vhostuser-count"
RECORD = NATIVE / "count/recorded.toml"
REQUESTS = 20_000
LIMIT = 0.05
ROWS = tuple(
    f"{disk} {operation} {depth}"
    for disk in ("null", "memory", "tmpfs")
    for operation in (("read",) if disk == "null" else ("read", "write"))
    for depth in (1, 32)
)
"""What is counted: disk, operation, requests at a time."""

CALLER = re.compile(r"\bcounted\b")
HALVES = {"submit": "driver", "reap": "driver", "step": "worker"}
CALLEE = re.compile(rf"\bBench\b.*\b({'|'.join(HALVES)})\b")
HEAD = """\
# Instructions per request of 4096 bytes: of the worker's half and of the driver's, by disk, operation and requests at a
# time. One section for each compiler. `make instructions RECORD=1` writes the section of the compiler that it finds.
"""


@dataclass(frozen=True, slots=True)
class Count:
    """Instructions per request."""

    worker: float
    driver: float

    @property
    def total(self) -> float:
        return self.worker + self.driver


Counts = Mapping[str, Count]


def halves(profile: str, requests: int) -> Count:
    """The two halves out of what callgrind wrote: what each function that ``counted`` calls costs with all it calls."""
    names: dict[str, str] = {}
    cost = dict.fromkeys(HALVES.values(), 0)
    caller = callee = ""
    found, in_call = set(), False
    for line in profile.splitlines():
        key, _, value = line.partition("=")
        if key in ("fn", "cfn"):
            number, _, name = value.partition(" ")  # the name comes with the number's first use only
            name = names.setdefault(number, name)
            caller, callee = (name, callee) if key == "fn" else (caller, name)
        elif key == "calls":
            in_call = True
        elif in_call:
            in_call = False
            if CALLER.search(caller) and (match := CALLEE.search(callee)):
                found.add(match[1])
                cost[HALVES[match[1]]] += int(line.split()[1])
    if missing := HALVES.keys() - found:
        raise SystemExit(f"benchmarks: callgrind saw no call of {', '.join(sorted(missing))} in vhostuser-count")
    return Count(*(round(cost[half] / requests, 1) for half in ("worker", "driver")))


def count(row: str) -> Count:
    """Have one row counted; about half a second."""
    with tempfile.TemporaryDirectory(prefix="vhostuser-count-") as place:
        out = Path(place) / "callgrind.out"
        tool = ["valgrind", "-q", "--tool=callgrind", "--toggle-collect=*::counted*", f"--callgrind-out-file={out}"]
        subprocess.run([*tool, PROGRAM, *row.split(), str(REQUESTS)], check=True)
        return halves(out.read_text(), REQUESTS)


def compiler() -> str:
    """The compiler's version and what it compiles for."""
    said = subprocess.run(["rustc", "-vV"], cwd=NATIVE, check=True, capture_output=True, text=True).stdout
    host = re.search(r"^host: (.*)$", said, re.MULTILINE)
    return f"{said.splitlines()[0]} {host[1] if host else ''}".strip()


def read_record(text: str) -> dict[str, dict[str, Count]]:
    """All sections, by compiler."""
    return {
        name: {row: Count(**numbers) for row, numbers in section.items()}
        for name, section in tomllib.loads(text).items()
    }


def write_record(record: Mapping[str, Counts]) -> str:
    """The record as text, the way `read_record` takes it."""
    lines = [HEAD]
    for name, section in sorted(record.items()):
        lines.append(f'["{name}"]')
        lines += [f'"{row}" = {{ worker = {it.worker}, driver = {it.driver} }}' for row, it in section.items()]
        lines.append("")
    return "\n".join(lines)


def change(now: float, recorded: float) -> float:
    """The rise as a share of what was recorded."""
    return (now - recorded) / recorded if recorded else 0.0


def table(now: Counts, recorded: Counts) -> str:
    """One line for each row and half."""
    lines = [f"{'instructions per request':26}{'':8}{'now':>9}{'recorded':>10}{'change':>9}"]
    for row, it in now.items():
        for half in ("worker", "driver", "total"):
            value, before = getattr(it, half), getattr(recorded.get(row), half, None)
            told = f"{'-':>10}{'-':>9}" if before is None else f"{before:10.1f}{change(value, before):+9.1%}"
            lines.append(f"{row if half == 'worker' else '':26}{half:8}{value:9.1f}{told}")
    return "\n".join(lines)


def verdict(now: Counts, recorded: Counts) -> list[str]:
    """What is wrong, one line each: halves that rose by more than `LIMIT`, and rows that were never recorded."""
    wrong = []
    for row, it in now.items():
        if row not in recorded:
            wrong.append(f"{row}: not recorded for this compiler")
            continue
        for half in ("worker", "driver"):
            if (rise := change(getattr(it, half), getattr(recorded[row], half))) > LIMIT:
                wrong.append(
                    f"{row}: the {half}'s half executes {rise:.1%} more than recorded; {LIMIT:.0%} is the limit"
                )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--record", action="store_true", help="record what is counted instead of comparing")
    record_it = parser.parse_args().record
    name = compiler()
    record = read_record(RECORD.read_text()) if RECORD.exists() else {}
    recorded = record.get(name, {})
    now = {row: count(row) for row in ROWS}
    print(name)
    print(table(now, recorded))
    if record_it:
        RECORD.write_text(write_record({**record, name: now}))
        print(f"Recorded in {RECORD.relative_to(NATIVE.parent)}.")
        return 0
    if wrong := verdict(now, recorded):
        if not recorded:
            wrong = [f"{name}: nothing was recorded for this compiler, so nothing can be compared"]
        print(*(f"vhostuser: instructions: {line}." for line in wrong), sep="\n", file=sys.stderr)
        print("If these numbers are to stand, record them: make instructions RECORD=1.", file=sys.stderr)
    elif any(change(it.total, recorded[row].total) < -LIMIT for row, it in now.items()):
        print("This is less than recorded. Record it, so that a way back up is seen: make instructions RECORD=1.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
