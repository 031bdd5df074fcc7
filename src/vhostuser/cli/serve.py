"""`vhostuser serve`: one disk on one socket, in the foreground. Touches: what serving a disk touches."""

from __future__ import annotations

import os

import click

from vhostuser.cli import failures

MAX_DEFAULT_QUEUES = 64


def size(text: str) -> int:
    """A number of bytes, like 4096 or 4K."""
    from vhostuser.disks import parse_size  # only when there is a size

    return parse_size(text)


def octal(text: str) -> int:
    """Permissions of a file."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.BadParameter(f"{text} is no mode in octal, like 0660")
    return mode


def default_queues() -> int:
    """One per processor of this host, which is at least what a hypervisor asks for by itself: one per virtual one."""
    return min(len(os.sched_getaffinity(0)), MAX_DEFAULT_QUEUES)


@click.command("serve", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("disk")
@click.option("--socket", metavar="PATH", help="Listen here; @NAME is an abstract socket.")
@click.option("--fd", type=click.IntRange(0), metavar="N", help="Serve on this inherited socket, or connection.")
@click.option(
    "--queues",
    type=int,
    default=lambda: default_queues(),
    show_default="one per processor",
    metavar="N",
    help="Queues offered.",
)
@click.option(
    "--threads", type=int, metavar="N", show_default="one per queue and processor", help="Threads that serve them."
)
@click.option("--read-only", is_flag=True, help="The guest may not write.")
@click.option("--serial", default="", metavar="TEXT", help="The serial the guest sees, up to 20 characters.")
@click.option("--block-size", type=size, show_default="what storage has", help="Logical block size.")
@click.option("--physical-block-size", type=size, show_default="what storage has", help="Physical block size.")
@click.option(
    "--seg-max", type=int, metavar="N", show_default="126", help="Data segments per request, at most queue size - 2."
)
@click.option(
    "--cache",
    type=click.Choice(["writeback", "writethrough", "none"]),
    default="writeback",
    show_default=True,
    help="The guest's write cache on, off, or on and around the host's page cache (O_DIRECT).",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "io_uring", "syscalls"]),
    default="auto",
    show_default=True,
    help="How files and block devices are read and written.",
)
@click.option(
    "--on-error",
    type=click.Choice(["report", "retry", "hold"]),
    default="report",
    show_default=True,
    help="What becomes of a request that storage fails: the guest is told, it is tried again, or you decide.",
)
@click.option(
    "--on-enospc",
    type=click.Choice(["report", "retry", "hold"]),
    default="report",
    show_default=True,
    help="The same for one that fails because storage is full.",
)
@click.option(
    "--retry-for",
    type=float,
    metavar="SECONDS",
    show_default="for ever",
    help="How long a request is tried again before the guest is told.",
)
@click.option("--rate-limit", metavar="iops=N,bps=N", help="Take at most so many requests and bytes a second.")
@click.option(
    "--poll-us",
    type=int,
    metavar="US",
    show_default="50",
    help="How long at most a thread looks for requests before it sleeps, in microseconds; 0: not at all.",
)
@click.option("--socket-mode", type=octal, default="0600", show_default=True, help="Permissions of the socket.")
@click.option("--socket-group", metavar="GROUP", help="Group of the socket.")
@click.option("--lock/--no-lock", default=True, help="Lock the image (two writers destroy it).", show_default=True)
@click.option(
    "--lock-timeout",
    type=click.FloatRange(0),
    default=30.0,
    metavar="SECONDS",
    show_default=True,
    help="How long to wait for another program to let go of the image.",
)
@click.option(
    "--stop-timeout",
    type=click.FloatRange(0, 3600),
    default=10.0,
    metavar="SECONDS",
    show_default=True,
    help="How long storage may take to finish after SIGTERM; 1 at most when the hypervisor keeps what is left.",
)
@click.option(
    "--incoming", is_flag=True, help="Live migration: the image is another server's until the guest starts here."
)
@click.option("--upgrade", is_flag=True, help="Take over from the server that runs with these options, and end it.")
@click.option("--control", metavar="PATH|none", show_default="SOCKET.ctl, none with --fd", help="The control socket.")
@click.option(
    "--inject", metavar="FAULTS", help="For testers: delay-read=5ms,error-write=1%,... (slow or failing requests)."
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="On stderr.")
@click.option("--exit-on-disconnect", "once", is_flag=True, help="End when the first virtual machine has left.")
@click.option(
    "--sandbox",
    type=click.Choice(["on", "require", "off"]),
    default="on",
    show_default=True,
    help="Give up files and system calls that serving does not need; 'require' fails where the kernel cannot do it.",
)
@click.option("--no-sandbox", is_flag=True, help="The same as --sandbox off.")
@failures.verbose_option
def command(log_format: str, sandbox: str, no_sandbox: bool, **chosen: object) -> None:
    """Serve DISK to virtual machines, one at a time: a path, memory:size=1G or null:size=1T.

    Stays in the foreground. SIGTERM and SIGINT end it once requests in flight are done, or after --stop-timeout; SIGHUP
    has it look whether the file's size changed.
    """
    from vhostuser.cli import logs  # not for --help
    from vhostuser.cli.service import Service

    logs.configure(log_format, verbose=failures.verbose())
    Service(sandbox="off" if no_sandbox else sandbox, **chosen).run()  # type: ignore[arg-type]  # click has converted what the options name
