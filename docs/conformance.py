"""Makes the conformance table: what is claimed, and the tests that prove it.

``python docs/conformance.py build/covers.json docs/reference/conformance.md`` fails, one line per fault, when a claimed
row is named by no passing test, when a passing test names a row that does not exist, or when a number of the
specification that the package knows has no row. Touches: these two files and `docs/conformance.toml`.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

CLAIMS = {"yes": "yes", "decoded": "decoded, refused", "no": "no"}


@dataclass(frozen=True, slots=True)
class Row:
    """One message, feature or request."""

    name: str
    number: str
    claim: str
    remark: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one kind."""

    title: str
    rows: list[Row]


def tables(path: Path) -> tuple[list[Table], list[str]]:
    """The tables of the data file, and what is wrong with them."""
    made: list[Table] = []
    faults: list[str] = []
    for entry in tomllib.loads(path.read_text())["table"]:
        module, _, name = entry["numbers"].partition(":")
        numbers = {item.name: int(item) for item in getattr(import_module(module), name)}
        skipped = set(entry.get("skipped", ()))
        faults += [
            f"{entry['numbers']}.{item}: it has no row" for item in numbers if item not in {*entry["rows"], *skipped}
        ]
        rows: list[Row] = []
        for item, value in entry["rows"].items():
            claim, remark = value if isinstance(value, list) else (value, "")
            if claim not in CLAIMS:
                faults.append(f"{item}: {claim!r} is no claim")
            if item not in numbers:
                faults.append(f"{item}: {entry['numbers']} does not know it")
            rows.append(Row(entry["prefix"] + item, _number(numbers.get(item, 0), name), claim, remark))
        made.append(Table(entry["title"], rows))
    return made, faults


def _number(value: int, name: str) -> str:
    """Bits are counted, everything else is a number as it is."""
    return f"bit {value.bit_length() - 1}" if name.endswith(("Feature", "Features")) else str(value)


def proofs(path: Path) -> dict[str, list[str]]:
    """Row -> the tests that named it and passed, without their parameters."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for test, rows in json.loads(path.read_text()).items():
        for row in rows:
            found[row].add(test.split("[", 1)[0])
    return {row: sorted(tests) for row, tests in found.items()}


def unproved(made: list[Table], proved: dict[str, list[str]]) -> list[str]:
    """Claims without a test, and tests that name no row."""
    rows = [row for table in made for row in table.rows]
    faults = [
        f"{row.name}: claimed, but no passing test names it"
        for row in rows
        if row.claim != "no" and row.name not in proved
    ]
    known = {row.name for row in rows}
    return faults + [
        f"{name}: named by {tests[0]}, but there is no such row" for name, tests in proved.items() if name not in known
    ]


def page(made: list[Table], proved: dict[str, list[str]]) -> str:
    """The page, in Markdown."""
    lines = [
        "# Conformance",
        "",
        "Generated from `docs/conformance.toml` and the last test run. *yes*: the back-end acts on it as the",
        "specification says. *decoded*: number, payload, rule and text are known to `vhostuser.protocol`, but the",
        "back-end does not offer it and refuses it. Every row that claims something is proved by the tests in its last",
        "column, which passed.",
    ]
    for table in made:
        lines += [
            "",
            f"## {table.title}",
            "",
            "| name | number | supported | remark | tests |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in table.rows:
            tests = " ".join(f"`{test.removeprefix('tests/')}`" for test in proved.get(row.name, []))
            lines.append(f"| `{row.name}` | {row.number} | {CLAIMS[row.claim]} | {row.remark} | {tests} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit code 1 when anything claimed is not proved; the page is not written then."""
    covers, target = map(Path, sys.argv[1:])
    made, faults = tables(Path(__file__).with_name("conformance.toml"))
    proved = proofs(covers)
    faults += unproved(made, proved)
    for fault in faults:
        print(f"vhostuser: conformance: {fault}.", file=sys.stderr)
    if faults:
        return 1
    target.parent.mkdir(exist_ok=True)
    target.write_text(page(made, proved))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
