"""The package's front door: every public name is there, and importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import vhostuser


def test_every_public_name_can_be_had_from_the_package() -> None:
    for name in vhostuser.__all__:
        assert getattr(vhostuser, name).__name__ == name


def test_the_list_of_names_and_their_homes_agree() -> None:
    assert sorted(vhostuser._HOME_OF) == vhostuser.__all__


def test_importing_the_package_imports_nothing_of_it() -> None:
    code = "import sys, vhostuser; print([name for name in sys.modules if name.startswith('vhostuser.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_that_of_the_package() -> None:
    assert vhostuser.__version__ == version("vhostuser")
