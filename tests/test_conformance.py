"""The conformance table is made only when every claim in it is proved."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def claimed() -> list[str]:
    """The rows that claim something, by their full names."""
    rows: list[str] = []
    for table in tomllib.loads((DOCS / "conformance.toml").read_text())["table"]:
        for name, value in table["rows"].items():
            if (value[0] if isinstance(value, list) else value) != "no":
                rows.append(table["prefix"] + name)
    return rows


def generate(directory: Path, covers: dict[str, list[str]]) -> subprocess.CompletedProcess[str]:
    """Runs the generator on what tests are said to have proved."""
    source = directory / "covers.json"
    source.write_text(json.dumps(covers))
    words = [sys.executable, str(DOCS / "conformance.py"), str(source), str(directory / "table.md")]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_table_is_made_when_every_claim_has_a_test(tmp_path: Path) -> None:
    done = generate(tmp_path, {"tests/test_x.py::test_all[1]": claimed()})
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "table.md").read_text()
    assert all(f"| `{row}` |" in page for row in claimed())
    assert "`test_x.py::test_all`" in page


@pytest.mark.parametrize("row", ["VHOST_USER_SET_MEM_TABLE", "VHOST_USER_GET_INFLIGHT_FD", "VIRTIO_BLK_F_DISCARD"])
def test_a_claim_without_a_passing_test_fails_and_is_named(tmp_path: Path, row: str) -> None:
    done = generate(tmp_path, {"tests/test_x.py::test_all": [name for name in claimed() if name != row]})
    assert done.returncode == 1
    assert done.stderr == f"vhostuser: conformance: {row}: claimed, but no passing test names it.\n"
    assert not (tmp_path / "table.md").exists()


def test_a_test_that_names_no_row_fails(tmp_path: Path) -> None:
    done = generate(tmp_path, {"tests/test_x.py::test_all": [*claimed(), "VHOST_USER_MISSPELT"]})
    assert done.returncode == 1
    assert "VHOST_USER_MISSPELT: named by tests/test_x.py::test_all, but there is no such row" in done.stderr
