"""`vhostuser write`: standard input to a disk. Touches: one connection, standard input."""

from __future__ import annotations

import click

from vhostuser.cli import failures, moving, reaching


@click.command("write", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("socket")
@click.option(
    "--offset", type=moving.size, default="0", show_default=True, help="Where to begin: bytes, like 4096 or 4K."
)
@click.option("--verify", is_flag=True, help="Read everything back and compare.")
@moving.quiet_option
@moving.json_option
@reaching.timeout_option
@failures.verbose_option
def command(socket: str, offset: int, verify: bool, quiet: bool, as_json: bool, timeout_s: float) -> None:
    """Write standard input to the disk behind the back-end on SOCKET, and flush it.

    A file that does not fit is refused before anything is written; a pipe, once the disk is full.
    """
    moving.move(
        moving.standard_input,
        lambda: moving.open_disk_side(socket, timeout_s, start=offset),
        moving.Manner(timeout_s, verify, quiet, as_json),
    )
