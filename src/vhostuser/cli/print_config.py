"""`vhostuser print-config`: how to connect a hypervisor to a socket. Touches: the control socket, when there is one."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import click

from vhostuser.cli import failures
from vhostuser.errors import UsageError, VhostUserError

RECONNECT_MS = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a configuration has to say."""

    socket: str
    """An absolute path, or an abstract name with its ``@``."""
    queues: int
    memory: str
    """The guest's memory as QEMU and Cloud Hypervisor write it: ``4G``."""
    qemu_version: tuple[int, int] | None


def qemu(wanted: Wanted) -> str:
    """Arguments for a shell command line."""
    address = f"path={_qemu_escaped(wanted.socket)}"
    if wanted.socket.startswith("@"):
        address = f"path={_qemu_escaped(wanted.socket[1:])},abstract=on"
    match wanted.qemu_version:
        case None:
            reconnect = ""
        case version if version >= (9, 2):
            reconnect = f",reconnect-ms={RECONNECT_MS}"
        case _:
            reconnect = f",reconnect={RECONNECT_MS // 1000}"
    options = [
        ("-m", wanted.memory),
        ("-object", f"memory-backend-memfd,id=mem,size={wanted.memory},share=on"),
        ("-machine", "memory-backend=mem"),
        ("-chardev", f"socket,id=vhostuser0,{address}{reconnect}"),
        ("-device", f"vhost-user-blk-pci,chardev=vhostuser0,num-queues={wanted.queues}"),
    ]
    return " \\\n".join(f"{option} {shlex.quote(value)}" for option, value in options)


def libvirt(wanted: Wanted) -> str:
    """The parts of a domain's XML that matter, in their places."""
    _must_be_a_path(wanted.socket, "libvirt")
    text = f"""<domain>
  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>
  <devices>
    <disk type='vhostuser' device='disk'>
      <driver name='qemu' type='raw' queues='{wanted.queues}'/>
      <source type='unix' path={quoteattr(wanted.socket)}>
        <reconnect enabled='yes' timeout='{RECONNECT_MS // 1000}'/>
      </source>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>"""
    ElementTree.fromstring(text)
    return text


def cloud_hypervisor(wanted: Wanted) -> str:
    """Arguments for a shell command line."""
    _must_be_a_path(wanted.socket, "cloud-hypervisor", forbidden=',"[]')
    disk = f"vhost_user=on,socket={wanted.socket},num_queues={wanted.queues},queue_size=128"
    return f"--memory size={wanted.memory},shared=on \\\n--disk {shlex.quote(disk)}"


def firecracker(wanted: Wanted) -> str:
    """The body of `PUT /drives/disk0`, which is also what stands in `drives` of a configuration file."""
    _must_be_a_path(wanted.socket, "firecracker")
    drive = {
        "drive_id": "disk0",
        "socket": wanted.socket,
        "is_root_device": False,
        "cache_type": "Writeback",
    }
    return json.dumps(drive, indent=2)


def crosvm(wanted: Wanted) -> str:
    """Arguments for a shell command line."""
    _must_be_a_path(wanted.socket, "crosvm", forbidden=',"[]')
    return f"--vhost-user {shlex.quote(f'type=block,socket={wanted.socket}')}"


KINDS: dict[str, Callable[[Wanted], str]] = {
    "qemu": qemu,
    "libvirt": libvirt,
    "cloud-hypervisor": cloud_hypervisor,
    "firecracker": firecracker,
    "crosvm": crosvm,
}

NOTES = {
    "qemu": "Memory must be shared (share=on). With --qemu-version QEMU connects again to a restarted disk.",
    "libvirt": "Read-only, serial number and block size are the disk's own: give them to vhostuser serve.",
    "cloud-hypervisor": "Memory must be shared (shared=on).",
    "firecracker": "PUT it to /drives/disk0; PATCH the same drive after a resize. One queue is used.",
    "crosvm": "Add these to crosvm run.",
}


@click.command("print-config")
@click.argument("socket")
@click.option("--for", "kind", type=click.Choice(list(KINDS)), required=True, help="The hypervisor.")
@click.option(
    "--queues", type=click.IntRange(1, 1024), help="Queues to use; as many as SOCKET serves when it can be asked."
)
@click.option("--memory", default="4G", show_default=True, help="The memory of the virtual machine.")
@click.option("--qemu-version", metavar="X.Y", help="The version of QEMU: adds the right reconnect option.")
@failures.verbose_option
def command(socket: str, kind: str, queues: int | None, memory: str, qemu_version: str | None) -> None:
    """Print what to paste into a hypervisor so that it uses the disk behind SOCKET.

    The result goes to stdout, a note on what matters to stderr.
    """
    if not re.fullmatch(r"[1-9][0-9]*[KMGT]", memory):
        raise UsageError(f"--memory {memory}", "this is not a size", "Write it like 512M or 4G")
    place = socket if socket.startswith("@") else os.path.abspath(socket)
    wanted = Wanted(place, queues or served_queues(place), memory, _version(qemu_version))
    print(KINDS[kind](wanted))
    if not (kind == "qemu" and qemu_version):
        click.echo(f"# {NOTES[kind]}", err=True)


def served_queues(socket: str) -> int:
    """The queues of the disk behind ``socket``, asked through its control socket; 1 when nobody answers."""
    from vhostuser.cli import asking  # not when --queues says it

    try:
        with asking.connect(socket, None) as client:
            return int(str(asking.ask(client, "disk.info")["num_queues"]))
    except (VhostUserError, OSError, KeyError, ValueError):
        return 1


def _version(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*", text)
    if match is None:
        raise UsageError(f"--qemu-version {text}", "this is not a version", "Write it like 10.0")
    return int(match[1]), int(match[2])


def _qemu_escaped(text: str) -> str:
    """A comma is written twice in QEMU's option lists."""
    return text.replace(",", ",,")


def _must_be_a_path(socket: str, kind: str, forbidden: str = "") -> None:
    if socket.startswith("@"):
        raise UsageError(socket, f"{kind} does not connect to abstract sockets", "Serve the disk on a path")
    if any(letter in socket for letter in forbidden):
        raise UsageError(
            socket, f"{kind} cannot be told a path with such letters in it", "Serve the disk on a plainer path"
        )
