"""A running guest: QEMU with disks behind vhost-user sockets, its QMP, a shell in it. Touches: processes, sockets."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .prepare import Machine, Qemu
from .processes import POLL_S, Child, ChildError, Deadline, readable
from .streams import CommandError, Listener, Qmp, Result, Shell

MIB: Final = 1 << 20
BOOT_S: Final = 40.0
START_S: Final = 30.0
COMMAND_S: Final = 60.0
RECONNECT_MS_SINCE: Final = (9, 2)


@dataclass(frozen=True, slots=True)
class Disk:
    """One vhost-user-blk device: the back-end's socket and the options of the device."""

    socket: Path
    name: str = "d0"
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    reconnect: bool = False

    def chardev(self, qemu: Qemu) -> dict[str, str | int]:
        """The character device that connects to the back-end."""
        words: dict[str, str | int] = {"id": f"c-{self.name}", "path": str(self.socket)}
        if self.reconnect:
            words |= {"reconnect-ms": 100} if qemu.version >= RECONNECT_MS_SINCE else {"reconnect": 1}
        return words

    def device(self, bus: str | None = None) -> dict[str, str | int | bool]:
        """The device; one queue unless the options say otherwise (QEMU's own default is one per virtual CPU)."""
        words: dict[str, str | int | bool] = {
            "driver": "vhost-user-blk-pci",
            "id": self.name,
            "chardev": f"c-{self.name}",
        }
        if bus is not None:
            words["bus"] = bus
        return words | {"num-queues": 1} | dict(self.options)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a guest is made of, beside its disks."""

    memory_mib: int = 256
    cpus: int = 1
    append: str = ""
    ports: int = 0  # PCIe root ports free for hot-plugging, named port0, port1, ...
    spare_memory_mib: int = 0  # memory that can be plugged in while the guest runs
    firmware_only: bool = False  # no kernel: SeaBIOS boots from a disk
    shared: bool = True
    iommu: bool = False


class Guest:
    """A guest from its start to its kill; use it as a context manager."""

    _numbers = itertools.count()

    def __init__(
        self,
        qemu: Qemu,
        machine: Machine,
        directory: Path,
        disks: Sequence[Disk],
        setup: Setup | None = None,
        *,
        incoming: bool = False,
    ) -> None:
        """Start QEMU in ``directory`` and wait until it answers; the guest itself is waited for by `wait_ready`.

        ``incoming``: nothing boots; a guest with the same setup and as many disks is to migrate here.
        """
        self.qemu = qemu
        self.setup = setup or Setup()
        self.disks = tuple(disks)
        number = next(self._numbers)
        self.console_log = directory / f"guest{number}.console"
        self._directory = directory
        self._memories = itertools.count(1)
        self._console_elsewhere = ""
        listeners = [Listener(directory / f"g{number}.{name}") for name in ("qmp", "sh")]
        command = [*qemu.command(), *self._arguments(machine, listeners[0].path, listeners[1].path)]
        for disk in disks:
            command += ["-chardev", "socket," + _joined(disk.chardev(qemu)), "-device", _joined(disk.device())]
        if incoming:
            command += ["-incoming", "defer"]
        self.process = Child(f"QEMU {qemu.name}", command, directory / f"guest{number}.qemu", qemu.environment())
        try:
            shell, qmp = [listener.accept(self.process, START_S) for listener in reversed(listeners)]
            self.qmp = Qmp(qmp)
        except BaseException:
            self.process.kill()
            for listener in listeners:
                listener.close()
            raise
        self.shell = Shell(shell)

    def _arguments(self, machine: Machine, qmp: Path, shell: Path) -> list[str]:
        setup = self.setup
        memory = f"{setup.memory_mib}M"
        share = "on" if setup.shared else "off"
        options = "q35,memory-backend=mem" + (",kernel-irqchip=split" if setup.iommu else "")
        words = ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-cpu", "qemu64,+rdrand"]
        words += ["-M", options, "-smp", str(setup.cpus)]
        words += ["-object", f"memory-backend-memfd,id=mem,size={memory},share={share}"]
        if setup.spare_memory_mib:
            words += ["-m", f"{memory},slots=8,maxmem={setup.memory_mib + setup.spare_memory_mib}M"]
        else:
            words += ["-m", memory]
        words += ["-serial", f"file:{self.console_log}"]
        words += ["-chardev", f"socket,id=shell,path={shell}", "-serial", "chardev:shell", "-qmp", f"unix:{qmp}"]
        if not setup.firmware_only:
            append = f"console=ttyS0 panic=-1 tsc=reliable mitigations=off {setup.append}".strip()
            words += ["-kernel", str(machine.kernel), "-initrd", str(machine.initramfs), "-append", append]
        if setup.iommu:
            words += ["-device", "intel-iommu,device-iotlb=on"]
        for port in range(setup.ports):
            words += ["-device", f"pcie-root-port,id=port{port},chassis={port + 1},slot={port + 1}"]
        return words

    def wait_ready(self) -> Self:
        """Wait until the guest takes commands, at its first start or at any later one."""
        try:
            self.shell.wait_ready(BOOT_S)
        except (AssertionError, TimeoutError) as error:
            raise type(error)(f"{error}\nthe guest's console ends: {self.console_tail()}") from None
        return self

    def run(self, script: str, limit_s: float = COMMAND_S) -> str:
        """Run a script in the guest and return its output; raises `CommandError` when it fails."""
        result = self.attempt(script, limit_s)
        if result.status:
            raise CommandError(
                f"`{script}` ended with {result.status}: {result.output}\nconsole: {self.console_tail()}"
            )
        return result.output

    def attempt(self, script: str, limit_s: float = COMMAND_S) -> Result:
        """Run a script in the guest; returns its exit status and output."""
        try:
            return self.shell.attempt(script, limit_s)
        except (AssertionError, TimeoutError) as error:
            raise type(error)(f"{error}\nthe guest's console ends: {self.console_tail()}") from None

    def console(self) -> str:
        """Everything the kernel wrote to the first serial port, here and where the guest came from."""
        here = self.console_log.read_bytes().decode(errors="replace") if self.console_log.exists() else ""
        return self._console_elsewhere + here

    def continues(self, source: Guest) -> None:
        """The guest of ``source`` runs here now: commands and its console go on."""
        self.shell.continues(source.shell)
        self._console_elsewhere = source.console()

    def wait_console(self, pattern: str, limit_s: float = BOOT_S) -> str:
        """Wait until the console holds ``pattern`` and return what matched."""
        deadline = Deadline(limit_s)
        while not (found := re.search(pattern, self.console())):
            if readable([self.process], POLL_S) or not deadline.left_s:
                raise ChildError(f"no `{pattern}` on the console: {self.console_tail()}\n{self.process.tail()}")
        return found[0]

    def console_tail(self) -> str:
        """The end of `console`."""
        return self.console()[-2000:]

    def reset(self) -> None:
        """Reset the machine as its button would, and wait for the guest to start again."""
        self.qmp.command("system_reset")
        self.wait_ready()

    def reboot(self) -> None:
        """Have the guest reboot itself, file systems synced but not unmounted, and wait for it to start again."""
        self.shell.post("sync; reboot -f")
        self.wait_ready()

    def plug(self, disk: Disk, port: str = "port0") -> None:
        """Connect a disk to the running guest."""
        words = dict(disk.chardev(self.qemu))
        address = {"type": "unix", "data": {"path": words.pop("path")}}
        name = words.pop("id")
        self.qmp.command(
            "chardev-add", id=name, backend={"type": "socket", "data": {"addr": address, "server": False, **words}}
        )
        self.qmp.command("device_add", **disk.device(port))

    def unplug(self, disk: Disk) -> None:
        """Ask the guest to give the disk back, wait until it did, and disconnect from the back-end."""
        self.qmp.command("device_del", id=disk.name)
        self.qmp.wait("DEVICE_DELETED", COMMAND_S, device=disk.name)
        self.qmp.command("chardev-remove", id=f"c-{disk.name}")

    def plug_memory(self, mib: int) -> None:
        """Plug ``mib`` MiB of shared memory into the running guest."""
        name = f"spare{next(self._memories)}"
        self.qmp.command("object-add", **{"qom-type": "memory-backend-memfd"}, id=name, size=mib * MIB, share=True)
        self.qmp.command("device_add", driver="pc-dimm", id=f"dimm-{name}", memdev=name)

    def kill(self) -> None:
        """Kill QEMU where it stands, as a crash would."""
        self.process.signal(signal.SIGKILL)
        self.process.wait(START_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.close()
        self.qmp.close()
        self.shell.close()


def _joined(words: Mapping[str, str | int | bool]) -> str:
    rest = [f"{name}={_text(value)}" for name, value in words.items() if name != "driver"]
    return ",".join([str(words["driver"]), *rest] if "driver" in words else rest)


def _text(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")
