"""`vhostuser resize`: gives a served disk another size. Touches: its control socket."""

from __future__ import annotations

import click

from vhostuser.cli import asking, failures


@click.command("resize", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("socket")
@click.argument("size", required=False)
@asking.control_option
@failures.verbose_option
def command(socket: str, size: str | None, control: str | None) -> None:
    """Give the disk served on SOCKET the size SIZE (like 20G), and tell its guest.

    Without SIZE the storage is looked at again: it may have been resized by other means.
    """
    with asking.connect(socket, control) as client:
        done = asking.ask(client, "disk.resize", **({} if size is None else {"size": size}))
    print(f"{done['size']} bytes: {done['message']}")
