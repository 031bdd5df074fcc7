"""Runs one Python target under libFuzzer: `python -m tests.fuzz.play TARGET OPTION...`, in a process of its own."""

from __future__ import annotations

import importlib
import sys

import atheris


def main() -> None:
    target = sys.argv.pop(1)
    with atheris.instrument_imports(include=["vhostuser"], enable_loader_override=False):
        one = importlib.import_module(f"tests.fuzz.{target}").one
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
