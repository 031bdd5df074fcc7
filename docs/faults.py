"""Makes the table of faults: what is tried, what must happen, and the tests that try it.

``python docs/faults.py docs/reference/faults.md`` fails, one line per fault, when a row names a test that does not
exist. Touches: that file, `docs/faults.toml`, and the sources of the tests.
"""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {".py": re.compile(r"^ *(?:async )?def (test_\w+)\(", re.M), ".rs": re.compile(r"^ *fn (\w+)\(\)", re.M)}
HEAD = """# Faults

Every fault and bad input that is tried, what must happen, and the tests that try it. Made of `docs/faults.toml` by
`docs/faults.py`, which demands that every test exists. A name without `test` is a fuzz target: `make fuzz`. Tests of
guests and peers run with `make guest` and `make interop`, those named `loom` with `make loom`, all others with
`make test`.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One fault."""

    fault: str
    must: str
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Faults of one origin."""

    title: str
    text: str
    rows: tuple[Row, ...]


def tables(path: Path = ROOT / "docs/faults.toml") -> list[Table]:
    """The tables of the data file."""
    return [
        Table(
            entry["title"],
            entry["text"].strip(),
            tuple(Row(row["fault"], row["must"], tuple(row["tests"])) for row in entry["row"]),
        )
        for entry in tomllib.loads(path.read_text())["table"]
    ]


@cache
def names_in(path: Path) -> frozenset[str]:
    """The tests that a source file has; none when there is no such file."""
    return frozenset(TESTS[path.suffix].findall(path.read_text())) if path.is_file() else frozenset()


def wrong(made: list[Table], root: Path = ROOT) -> list[str]:
    """Rows without a test, and tests that do not exist."""
    found = []
    for row in (row for table in made for row in table.rows):
        if not row.tests:
            found.append(f"{row.fault}: no test is named")
        for test in row.tests:
            path, _, name = test.partition("::")
            there = name in names_in(root / path) if name else (root / path).is_file()
            if not there:
                found.append(f"{row.fault}: there is no {test}")
    return found


def page(made: list[Table]) -> str:
    """The page, in Markdown."""
    lines = [HEAD]
    for table in made:
        lines += [
            f"## {table.title}",
            "",
            table.text,
            "",
            "| fault | what must happen | tried by |",
            "| --- | --- | --- |",
        ]
        for row in table.rows:
            tests = " ".join(f"`{test.removeprefix('tests/').removeprefix('native/')}`" for test in row.tests)
            lines.append(f"| {row.fault} | {row.must} | {tests} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Exit code 1 when a named test does not exist; the page is not written then."""
    made = tables()
    faults = wrong(made)
    for fault in faults:
        print(f"vhostuser: faults: {fault}.", file=sys.stderr)
    if faults:
        return 1
    Path(sys.argv[1]).write_text(page(made))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
