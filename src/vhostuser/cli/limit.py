"""`vhostuser limit`: changes how much a served disk takes a second. Touches: its control socket."""

from __future__ import annotations

from dataclasses import asdict

import click

from vhostuser.cli import asking, failures


@click.command("limit", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("socket")
@click.argument("limit", required=False, metavar="[iops=N,bps=N|none]")
@asking.control_option
@failures.verbose_option
def command(socket: str, limit: str | None, control: str | None) -> None:
    """Take at most so many requests and bytes a second for the disk served on SOCKET, from now on.

    What LIMIT leaves out has no limit; without LIMIT nothing changes. Prints the limit in force.
    """
    from vhostuser.blk import RateLimit  # not for --help

    wanted = asdict(RateLimit.parse(limit)) if limit is not None else {}
    with asking.connect(socket, control) as client:
        found = asking.ask(client, "disk.limit", **wanted)
    print(RateLimit(asking.number(found, "iops"), asking.number(found, "bps")))
