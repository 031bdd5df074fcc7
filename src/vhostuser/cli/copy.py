"""`vhostuser copy`: between back-ends, files and standard streams. Touches: what it is told to copy."""

from __future__ import annotations

import os

import click

from vhostuser.cli import failures, moving, reaching
from vhostuser.errors import UsageError


@click.command("copy", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--verify", is_flag=True, help="Read everything back and compare.")
@moving.quiet_option
@moving.json_option
@reaching.timeout_option
@failures.verbose_option
def command(source: str, target: str, verify: bool, quiet: bool, as_json: bool, timeout_s: float) -> None:
    """Copy FROM one place TO another: each is a back-end's socket (or vhost:PATH), a file, or - for a standard stream.

    A file is made, or replaced. A disk has to be large enough; what is beyond the end of the copy stays as it is.
    Zeroes are not written but made, and holes in files are neither read nor filled. What storage fails to read or write
    is left out, named with its offset, and everything else is copied; the exit code is 1 then.
    """
    places = [text.removeprefix(moving.BACKEND) for text in (source, target) if text != moving.STANDARD]
    if len(places) == 2 and os.path.realpath(places[0]) == os.path.realpath(places[1]):
        raise UsageError(target, "it is both what is copied and where to", "Name another")
    moving.move(
        lambda: moving.open_source(source, timeout_s),
        lambda: moving.open_sink(target, timeout_s),
        moving.Manner(timeout_s, verify, quiet, as_json),
    )
