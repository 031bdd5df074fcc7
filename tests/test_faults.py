"""The table of faults names tests that exist, and its page is the one in the tree."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOSTILE_DRIVERS = 26
"""The ways of a driver to go wrong that we know of."""


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", ROOT / "docs/faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    return module


def test_every_test_that_the_table_names_exists(faults: ModuleType) -> None:
    assert faults.wrong(faults.tables()) == []


def test_every_way_of_a_driver_to_go_wrong_has_its_row(faults: ModuleType) -> None:
    assert len(faults.tables()[0].rows) == HOSTILE_DRIVERS


def test_the_page_is_made_of_the_table(faults: ModuleType) -> None:
    page = (ROOT / "docs/reference/faults.md").read_text()
    assert page == faults.page(faults.tables()), "run python docs/faults.py docs/reference/faults.md"


def test_a_test_that_is_not_there_is_told(faults: ModuleType, tmp_path: Path) -> None:
    row = faults.Row("a fault", "nothing", ("tests/test_faults.py::test_nobody_wrote", "native/fuzz/targets/no.rs"))
    assert faults.wrong([faults.Table("", "", (row, faults.Row("another", "", ())))]) == [
        "a fault: there is no tests/test_faults.py::test_nobody_wrote",
        "a fault: there is no native/fuzz/targets/no.rs",
        "another: no test is named",
    ]
