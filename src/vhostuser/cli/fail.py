"""`vhostuser fail`: tells the guest that held requests failed. Touches: the disk's control socket."""

from __future__ import annotations

import click

from vhostuser.cli import asking, failures


@click.command("fail", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("socket")
@asking.request_option
@asking.control_option
@failures.verbose_option
def command(socket: str, request: tuple[str, ...], control: str | None) -> None:
    """Give up the held requests of the disk served on SOCKET, also those that wait for their next attempt.

    The guest sees an I/O error for each. Prints how many.
    """
    count = asking.decide(socket, control, "disk.fail", request)
    print(f"{count} request{'' if count == 1 else 's'} failed")
