"""The demonstration behind ``make demo``: an image served to a real guest, which uses it the way a person would.

Touches: a temporary directory, the package cache (filled on the first run), processes that all end with it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.guest.backends import Export, Ours
from tests.guest.images import MIB, allocated, blank
from tests.guest.machines import Disk, Guest
from tests.guest.packages import PackagesError
from tests.guest.prepare import OFFERS, Qemu, machine, present

SIZE_MIB: Final = 256
GROWN_MIB: Final = 512
FILES: Final = 40
FALLBACK: Final = "10.0"

FILL: Final = f"""
mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && cd /mnt || exit 1
for number in $(seq {FILES}); do head -c $((number * 20000)) /dev/urandom >file$number || exit 1; done
sha256sum file* >/mnt/sums && sync
"""
WASTE: Final = "head -c 40000000 /dev/urandom >/mnt/waste && sync"
DISCARD: Final = "rm /mnt/waste && sync && fstrim /mnt"
CHECK: Final = "cd /mnt && sha256sum -c sums >/tmp/said || { cat /tmp/said; exit 1; }"

AFTERWARDS: Final = """
Serve an image of your own:

  {vhostuser} serve disk.img --socket /tmp/disk.sock

and give it to a machine (its memory must be shared):

  qemu-system-x86_64 -M q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=c0,path=/tmp/disk.sock \\
    -device vhost-user-blk-pci,chardev=c0,num-queues=1 ...

`vhostuser print-config /tmp/disk.sock --for libvirt` says it for other hypervisors."""


class Story:
    """Tells what happens, each line with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def tell(self, line: str) -> None:
        """Print one line."""
        print(f"{time.monotonic() - self._start:6.1f} s  {line}", flush=True)


def chosen_qemu(story: Story) -> Qemu:
    """The newest QEMU that is here; one is fetched when there is none."""
    found = present()
    if not found:
        story.tell("fetching QEMU and a Debian kernel, once (nothing is installed: all of it stays below .cache/)")
    return found[-1] if found else OFFERS[FALLBACK].fetch()


def tell_disk(story: Story, guest: Guest, directory: Path) -> None:
    """Run the whole story in a booted guest."""
    image = directory / "disk.img"
    release, sectors = guest.run("uname -r; cat /sys/block/vda/size").split()
    size = int(sectors) * 512 // MIB
    story.tell(f"booted Linux {release} in QEMU {guest.qemu.name}: it sees a disk of {size} MiB, /dev/vda")
    guest.run(FILL)
    story.tell(f"in the guest: mkfs.ext4, mount, {FILES} files and their SHA-256 sums")
    guest.run(WASTE)
    full = allocated(image)
    guest.run(DISCARD)
    left = allocated(image)
    if left > full - 30_000_000:
        raise AssertionError(f"the discarded space was not given back: {full} bytes before, {left} after")
    story.tell("in the guest: 40 MB more written, deleted, and discarded with fstrim")
    story.tell(f"on the host: the image took {full / 1e6:.0f} MB before the discard, {left / 1e6:.0f} MB after it")


def run(story: Story, stack: ExitStack) -> None:
    """Everything from the image to the last checksum."""
    qemu = chosen_qemu(story)
    parts = machine()
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhostuser-demo-")))
    image = blank(directory / "disk.img", SIZE_MIB * MIB)
    story.tell(f"made an image of {SIZE_MIB} MiB")
    backend = stack.enter_context(Ours(image, directory, Export()))
    story.tell("serving it: vhostuser serve disk.img --socket disk.sock")
    guest = stack.enter_context(Guest(qemu, parts, directory, [Disk(backend.socket)])).wait_ready()
    tell_disk(story, guest, directory)
    backend.resize(GROWN_MIB * MIB)
    guest.run(f"until [ $(cat /sys/block/vda/size) = {GROWN_MIB * MIB // 512} ]; do usleep 20000; done")
    guest.run("resize2fs /dev/vda")
    room = guest.run("df -m /mnt | awk 'END {print $2}'").strip()
    story.tell(f"vhostuser resize disk.sock {GROWN_MIB}M: the mounted file system now has {room} MiB")
    guest.reboot()
    story.tell("rebooted the guest")
    guest.run("e2fsck -f -n /dev/vda")
    guest.run(f"mount /dev/vda /mnt && {CHECK}")
    story.tell(f"in the guest: e2fsck finds nothing wrong, the sums of all {FILES} files are right")
    statistics = backend.statistics()
    story.tell(f"what the back-end counted: {counted(statistics)}")


def counted(statistics: dict[str, object]) -> str:
    """The totals of ``vhostuser stats --json`` as a few words."""
    return ", ".join(f"{name} {value}" for name, value in totals(statistics))


def totals(statistics: dict[str, object]) -> Iterator[tuple[str, int]]:
    """Sums over all queues of the counters that say something to a person."""
    queues = statistics.get("queues")
    if isinstance(queues, list):
        for name in ("reads", "writes", "flushes", "discards"):
            yield name, sum(int(queue.get(name, 0)) for queue in queues)


@contextmanager
def clear_failures() -> Iterator[None]:
    """End with one line and status 1 when something fails; the machinery has put its evidence into the message."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("vhostuser demo: interrupted")
    except (AssertionError, PackagesError, OSError, TimeoutError) as error:
        sys.exit(f"vhostuser demo: {error}")


def main() -> int:
    """Tell the story; returns the exit status."""
    print("A virtual machine on a disk that vhostuser serves.\n")
    with clear_failures(), ExitStack() as stack:
        run(Story(), stack)
        print(AFTERWARDS.format(vhostuser=Path(sys.executable).with_name("vhostuser")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
