"""The program `vhost-user-blk`: a block back-end as management software starts it.

Spec: vhost-user: Backend program conventions. Touches: what serving a disk touches.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import click

from vhostuser.cli import failures
from vhostuser.errors import UsageError

PROGRAM = "vhost-user-blk"
CAPABILITIES: dict[str, object] = {"type": "block", "features": ["read-only", "blk-file"]}


@click.command(PROGRAM, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--socket-path", metavar="PATH", help="Make the vhost-user socket here and listen on it.")
@click.option(
    "--fd", type=click.IntRange(0), metavar="FDNUM", help="Use this inherited socket, listening or connected."
)
@click.option("--blk-file", metavar="PATH", help="The image file or block device to serve.")
@click.option("--read-only", is_flag=True, help="The guest may not write.")
@click.option("--no-sandbox", is_flag=True, help="Do not give up files and system calls that serving does not need.")
@click.option("--print-capabilities", is_flag=True, help="Print what this program can do as JSON, and nothing else.")
@click.option(
    "--print-discovery", is_flag=True, help="Print the discovery file for this program where it is installed."
)
@failures.verbose_option
def command(
    socket_path: str | None, fd: int | None, blk_file: str | None, read_only: bool, no_sandbox: bool, **_: bool
) -> None:
    """Serve a file or block device as a virtio disk over vhost-user, following the back-end program conventions.

    Stays in the foreground, ends on SIGTERM. `vhostuser serve` does the same with more to choose.
    """
    if blk_file is None:
        raise UsageError("--blk-file", "missing", "Name the image file or block device to serve")
    from vhostuser.cli import logs  # not for --help
    from vhostuser.cli.serve import default_queues
    from vhostuser.cli.service import NO_CONTROL, Service

    logs.configure("text", verbose=failures.verbose())
    Service(
        disk=os.path.abspath(blk_file),  # always a path: nothing else is spelt here
        socket=socket_path,
        socket_option="--socket-path",
        fd=fd,
        read_only=read_only,
        queues=default_queues(),
        control=NO_CONTROL,
        sandbox="off" if no_sandbox else "on",
    ).run()


def discovery() -> dict[str, object]:
    """The content of the discovery file, with the absolute path by which this program was started."""
    return {
        "description": "vhostuser: virtual disks from files, block devices and memory",
        "type": "block",
        "binary": str(installed_at()),
        "tags": ["vhostuser"],
    }


def installed_at() -> Path:
    """The absolute path of this program: how it was called, else beside the interpreter that runs it."""
    called = shutil.which(sys.argv[0])
    if called is not None and Path(called).name == PROGRAM:
        return Path(os.path.abspath(called))
    return Path(sys.executable).with_name(PROGRAM)


def main() -> None:
    """Entry point of the program."""
    printed = {"--print-capabilities": CAPABILITIES, "--print-discovery": discovery()}
    for option, content in printed.items():
        if option in sys.argv[1:]:
            # The conventions: every other option and argument is ignored then, sense or nonsense.
            raise SystemExit(failures.run(_printer(content), PROGRAM, []))
    raise SystemExit(failures.run(command, PROGRAM))


def _printer(content: dict[str, object]) -> click.Command:
    return click.Command(PROGRAM, callback=lambda: print(json.dumps(content, indent=2)))


if __name__ == "__main__":
    main()
