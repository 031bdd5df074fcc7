"""`vhostuser retry`: has requests that storage failed tried again. Touches: the disk's control socket."""

from __future__ import annotations

import click

from vhostuser.cli import asking, failures


@click.command("retry", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("socket")
@asking.request_option
@asking.control_option
@failures.verbose_option
def command(socket: str, request: tuple[str, ...], control: str | None) -> None:
    """Try the held requests of the disk served on SOCKET again, now; also those that wait for their next attempt.

    Prints how many. One that fails once more is held again: see `vhostuser stats --inflight`.
    """
    count = asking.decide(socket, control, "disk.retry", request)
    print(f"{count} request{'' if count == 1 else 's'} tried again")
