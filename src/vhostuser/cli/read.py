"""`vhostuser read`: a disk, or a part of it, to standard output. Touches: one connection, standard output."""

from __future__ import annotations

import click

from vhostuser.cli import failures, moving, reaching


@click.command("read", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("socket")
@click.option(
    "--offset", type=moving.size, default="0", show_default=True, help="Where to begin: bytes, like 4096 or 4K."
)
@click.option("--length", type=moving.size, show_default="up to the end", help="How much: bytes, like 1M.")
@moving.quiet_option
@reaching.timeout_option
@failures.verbose_option
def command(socket: str, offset: int, length: int | None, quiet: bool, timeout_s: float) -> None:
    """Read the disk behind the back-end on SOCKET to standard output, which must not be a terminal."""
    moving.move(
        lambda: moving.open_disk_side(socket, timeout_s, start=offset, length=length),
        moving.standard_output,
        moving.Manner(timeout_s, quiet=quiet),
    )
