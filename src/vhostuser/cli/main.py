"""The program `vhostuser`: finds the command and runs it; a command's module is imported only when it is asked for.

Touches: what the commands touch.
"""

from __future__ import annotations

from importlib import import_module

import click

from vhostuser.cli import failures

COMMANDS = {
    "serve": "Serve a disk to a virtual machine.",
    "resize": "Change the size of a disk that is being served.",
    "stats": "Show what a served disk has done so far.",
    "retry": "Have requests that storage failed tried again.",
    "fail": "Tell the guest that requests failed which are held.",
    "limit": "Change how much a disk takes a second.",
    "print-config": "Print what to paste into a hypervisor.",
    "probe": "Ask a back-end what it offers, and who can use it.",
    "read": "Read a disk from its back-end to standard output.",
    "write": "Write standard input to the disk of a back-end.",
    "copy": "Copy between back-ends, files and standard streams.",
    "migrate": "Move a disk between two back-ends under load.",
    "bench": "Measure a back-end, or compare two.",
}


class Commands(click.Group):
    """The commands, each in its own module: `print-config` is `command` in `vhostuser.cli.print_config`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"vhostuser.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=Commands, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vhostuser", message="%(prog)s %(version)s")
def command() -> None:
    """Virtual disks for virtual machines."""


def main() -> None:
    """Entry point of the program."""
    raise SystemExit(failures.run(command, "vhostuser"))


if __name__ == "__main__":
    main()
