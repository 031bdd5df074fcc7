"""`_native.pyi` is the contract of the native module: names, parameters and defaults are held against the build."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_stub_says_what_the_built_module_has(tmp_path: Path) -> None:
    only_in_the_stub = tmp_path / "allowed"
    only_in_the_stub.write_text("vhostuser._native.RegionTuple\nvhostuser._native.__all__\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy.stubtest", "vhostuser._native", "--concise", "--ignore-disjoint-bases"),
            *("--mypy-config-file", str(ROOT / "pyproject.toml"), "--allowlist", str(only_in_the_stub)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
