"""Each package touches what the style guide's table says it may, and the imports are held to it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "vhostuser"

PURE_STANDARD = frozenset(
    {"__future__", "abc", "collections", "contextlib", "dataclasses", "enum", "struct", "types", "typing", "uuid"}
)
"""Modules that reach neither sockets, descriptors, clocks, threads nor logs. `contextlib` is for `suppress`."""

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "fds": (),
    "protocol": ("errors", "protocol", "virtio"),
    "virtio": ("virtio",),
    "socketpath": ("errors", "fds"),
    "transport": ("errors", "fds", "protocol", "socketpath"),
    "backend": ("errors", "fds", "protocol", "virtio", "transport", "_native", "backend"),
    "frontend": ("errors", "fds", "protocol", "virtio", "transport", "_native", "frontend"),
    "disks": ("errors", "fds", "_native", "disks"),
    "blk": ("errors", "fds", "protocol", "virtio", "transport", "_native", "backend", "frontend", "disks", "blk"),
    "copying": ("errors", "fds", "virtio", "disks", "blk", "copying"),
    "bench": ("errors", "protocol", "virtio", "_native", "frontend", "blk", "bench"),
}
"""Parts of this package that a part may import; `errors`, `fds` and what is pure are open to all above them."""

PURE = ("errors", "protocol", "virtio")

NOT_BELOW_TRANSPORT = frozenset({"socket", "socketserver", "asyncio"})
"""Only `transport` touches the control socket; whoever imports these in another part shows why, below."""

MAY_TOUCH_SOCKETS = ("transport", "socketpath", "cli", "control", "systemd")

FOR_EVENT_LOOPS = ("blk/aio.py",)
"""These offer to others what they do as coroutines, and let their loop watch descriptors."""


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The package, or single module, right below `vhostuser` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at the top or anywhere else, and also for type checking only."""
    found: set[str] = set()
    here = path.relative_to(SOURCE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: -node.level]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            if module == "vhostuser":
                found |= {f"vhostuser.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_no_part_that_it_may_not_touch(path: Path) -> None:
    allowed = MAY_IMPORT.get(part_of(path))
    if allowed is None:  # the public names, the commands, and what the commands alone use
        return
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("vhostuser.")}
    assert ours <= set(allowed), f"{path.relative_to(PACKAGE)} may not import {sorted(ours - set(allowed))}"
    assert "vhostuser" not in imports(path) or ours, "a part does not import the public names"


@pytest.mark.parametrize(
    "path", [path for path in modules() if part_of(path) in PURE], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_pure_module_imports_nothing_that_has_effects(path: Path) -> None:
    foreign = {name.split(".")[0] for name in imports(path)} - {"vhostuser"}
    assert foreign <= PURE_STANDARD, f"{path.relative_to(PACKAGE)} imports {sorted(foreign - PURE_STANDARD)}"
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input", "__import__", "exec", "eval"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_transport_touches_sockets(path: Path) -> None:
    if part_of(path) in MAY_TOUCH_SOCKETS:
        return
    foreign = {name.split(".")[0] for name in imports(path)}
    allowed = {"asyncio"} if str(path.relative_to(PACKAGE)) in FOR_EVENT_LOOPS else set()
    assert not foreign & NOT_BELOW_TRANSPORT - allowed


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_is_and_stays_short(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module says what it is and what it touches"
    assert len(text.splitlines()) < 400, "a file of 400 lines is two files"


def test_the_commands_use_public_names_only() -> None:
    for path in (PACKAGE / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vhostuser"):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                outside = not (node.module or "").startswith("vhostuser.cli")
                private = [part for part in parts if part.startswith("_") and outside and part != "__version__"]
                assert not private, f"{path.relative_to(PACKAGE)} imports {private}"
