"""`vhostuser probe`: what a back-end offers, and who will be able to use it. Touches: one connection to it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from vhostuser.cli import failures, reaching, screen

if TYPE_CHECKING:
    from vhostuser.blk.hosts import Verdict
    from vhostuser.blk.probe import Findings
    from vhostuser.virtio.blk import VirtioBlkConfig


@click.command("probe", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("socket")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@reaching.timeout_option
@failures.verbose_option
def command(socket: str, as_json: bool, timeout_s: float) -> None:
    """Ask the back-end on SOCKET what it offers, as a disk, and say which programs will be able to use it.

    It sees a front-end that connects, asks and leaves; no memory is shared and nothing is read or written. A back-end
    that has a front-end already refuses a second one, or lets it wait: that is said, and disturbs neither.
    """
    from vhostuser.blk.hosts import verdicts
    from vhostuser.blk.probe import probe

    with reaching.reaching(socket):
        found = probe(socket, timeout_s=timeout_s)
    judged = verdicts(found)
    if as_json:
        print(json.dumps(facts(found, judged), indent=2))
    else:
        show(found, judged)


def facts(found: Findings, judged: list[Verdict]) -> dict[str, object]:
    """All of it, for programs."""
    return {
        "socket": found.socket,
        "features": {"value": found.features, "names": names_of(found.features)},
        "protocol_features": {"value": int(found.protocol_features), "names": protocol_names(found)},
        "num_queues": found.num_queues,
        "mem_slots": found.mem_slots,
        "status": found.status,
        "config": None if found.config is None else asdict(found.config),
        "config_bytes": found.config_bytes,
        "refusals": list(found.refusals),
        "hosts": [{"name": one.host, "able": one.able, "reasons": list(one.reasons)} for one in judged],
    }


def names_of(features: int) -> list[str]:
    """The names of feature bits, also of those that vhost-user has among them."""
    from vhostuser.virtio.blk import BlkFeature
    from vhostuser.virtio.features import feature_names

    ours = {"bit 26": "LOG_ALL", "bit 30": "PROTOCOL_FEATURES"}
    return [ours.get(name, name) for name in feature_names(features, BlkFeature)]


def protocol_names(found: Findings) -> list[str]:
    """The names of the protocol features offered, lowest first."""
    from vhostuser.protocol import ProtocolFeature

    known = {int(bit): str(bit.name) for bit in ProtocolFeature}
    value = int(found.protocol_features)
    bits = [1 << number for number in range(value.bit_length()) if value >> number & 1]
    return [known.get(bit, f"bit {bit.bit_length() - 1}") for bit in bits]


def show(found: Findings, judged: list[Verdict]) -> None:
    """All of it, for a person."""
    from rich.table import Table

    console = screen.console()
    about = Table.grid(padding=(0, 2))
    about.add_row("features", " ".join(names_of(found.features)) or "none")
    about.add_row("protocol features", " ".join(protocol_names(found)) or "none")
    about.add_row("queues", "1, or it does not tell" if found.num_queues is None else str(found.num_queues))
    about.add_row("memory slots", "at least 8: it does not tell" if found.mem_slots is None else str(found.mem_slots))
    about.add_row("device status", "it does not tell" if found.status is None else status_text(found.status))
    if found.config is None:
        about.add_row("configuration", "it does not tell")
    else:
        for name, text in config_rows(found.config, found.features):
            about.add_row(name, text)
    for refusal in found.refusals:
        about.add_row("trouble", refusal)
    console.print(found.socket)
    console.print(about)
    hosts = Table("can it be used by", "", "why not, or what to know", box=None, padding=(0, 2))
    for one in judged:
        hosts.add_row(one.host, "yes" if one.able else "no", "\n".join(one.reasons))
    console.print()
    console.print(hosts)


def status_text(status: int) -> str:
    """The bits of the device status by name."""
    from vhostuser.virtio.status import DeviceStatus

    names = [str(bit.name) for bit in DeviceStatus if status & bit]
    return f"{status:#04x} {' '.join(names)}".strip()


def config_rows(config: VirtioBlkConfig, features: int) -> list[tuple[str, str]]:
    """What the configuration says, as far as the features give it a meaning."""
    from vhostuser.virtio.blk import SECTOR, BlkFeature, ZonedModel

    def gated(feature: BlkFeature, name: str, text: str) -> list[tuple[str, str]]:
        return [(name, text)] if features & feature else []

    def limited(sectors: int, segments: int) -> str:
        most = f"up to {sectors * SECTOR} bytes" if sectors else "any length"
        return f"ranges of {most}, {segments or 'any number'} at once"

    block = config.blk_size if features & BlkFeature.BLK_SIZE else SECTOR
    rows = [("size", f"{config.capacity * SECTOR} bytes, {config.capacity} sectors")]
    rows += gated(BlkFeature.RO, "read-only", "yes")
    rows += gated(BlkFeature.BLK_SIZE, "logical block", f"{config.blk_size} bytes")
    physical = f"{block << min(config.physical_block_exp, 32)} bytes, first at block {config.alignment_offset}"
    rows += gated(BlkFeature.TOPOLOGY, "physical block", physical)
    best = f"at least {config.min_io_size * block} bytes, best {config.opt_io_size * block or 'not known'}"
    rows += gated(BlkFeature.TOPOLOGY, "requests", best)
    rows += gated(BlkFeature.SIZE_MAX, "segment", f"up to {config.size_max or 'any number of'} bytes")
    rows += gated(BlkFeature.SEG_MAX, "segments", f"up to {config.seg_max} in one request")
    geometry = f"{config.cylinders} cylinders, {config.heads} heads, {config.sectors} sectors"
    rows += gated(BlkFeature.GEOMETRY, "geometry", geometry)
    cache = "on" if config.writeback else "off"
    rows += gated(BlkFeature.CONFIG_WCE, "write cache", f"{cache}, can be switched")
    rows += gated(BlkFeature.MQ, "queues (configuration)", str(config.num_queues))
    discard = limited(config.max_discard_sectors, config.max_discard_seg)
    aligned = f"{discard}, in steps of {config.discard_sector_alignment * SECTOR or block} bytes"
    rows += gated(BlkFeature.DISCARD, "discard", aligned)
    zeroes = limited(config.max_write_zeroes_sectors, config.max_write_zeroes_seg)
    unmap = "may give space back" if config.write_zeroes_may_unmap else "keeps the space"
    rows += gated(BlkFeature.WRITE_ZEROES, "write zeroes", f"{zeroes}, {unmap}")
    erase = limited(config.max_secure_erase_sectors, config.max_secure_erase_seg)
    rows += gated(BlkFeature.SECURE_ERASE, "secure erase", erase)
    known = config.model in ZonedModel.__members__.values()
    model = ZonedModel(config.model).name.lower().replace("_", "-") if known else f"unknown ({config.model})"
    rows += gated(BlkFeature.ZONED, "zones", f"{model}, {config.zone_sectors * SECTOR} bytes each")
    return rows
