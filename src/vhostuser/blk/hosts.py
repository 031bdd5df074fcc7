"""Which programs can use a back-end as a disk: one table of what each needs, and why. Touches nothing.

An entry stands here when the program is known to need it, from its source or from what it was seen to send. What is
only likely is a note. Nobody can read off a back-end whether it works, only whether it would be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vhostuser.blk.probe import LARGEST_CONFIG, Findings
from vhostuser.protocol import F_LOG_ALL, ProtocolFeature
from vhostuser.virtio.blk import BlkFeature, ZonedModel
from vhostuser.virtio.features import RingFeature


@dataclass(frozen=True, slots=True)
class Point:
    """Something about a back-end that matters to a program, and the sentence to say where it is so."""

    applies: Callable[[Findings], bool]
    says: str


@dataclass(frozen=True, slots=True)
class Host:
    """A program that uses disks over vhost-user."""

    name: str
    refuses: tuple[Point, ...]
    """Where one applies, the program cannot use the back-end."""
    notes: tuple[Point, ...] = ()
    """Where one applies, it can, with less."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program can use a back-end."""

    host: str
    able: bool
    reasons: tuple[str, ...]
    """Why not; what to know when it can."""


def _lacks(feature: ProtocolFeature) -> Callable[[Findings], bool]:
    return lambda found: feature not in found.protocol_features


def _lacks_feature(feature: int) -> Callable[[Findings], bool]:
    return lambda found: not found.features & feature


def _odd_block(found: Findings) -> bool:
    if found.config is None or not found.features & BlkFeature.BLK_SIZE:
        return False
    size = found.config.blk_size
    return size < 512 or size > 4096 or bool(size & (size - 1))


def _host_managed(found: Findings) -> bool:
    zoned = bool(found.features & BlkFeature.ZONED)
    return zoned and found.config is not None and found.config.model == ZonedModel.HOST_MANAGED


NO_CONFIG: Final = Point(
    lambda found: ProtocolFeature.CONFIG not in found.protocol_features,
    "it reads the disk's size from the configuration space, and the back-end does not offer CONFIG",
)
SHORT_CONFIG: Final = Point(
    lambda found: ProtocolFeature.CONFIG in found.protocol_features and found.config_bytes < 60,
    "it asks for 60 bytes of the configuration, and the back-end does not answer that",
)
NO_CAPACITY: Final = Point(
    lambda found: ProtocolFeature.CONFIG in found.protocol_features and found.config is None,
    "the back-end offers CONFIG and does not tell its configuration",
)
WHOLE_CONFIG: Final = Point(
    lambda found: found.config is not None and not found.config_by_field,
    "it reads the configuration field by field, and the back-end answers other offsets than 0 wrongly or not at all",
)
ABSTRACT: Final = Point(lambda found: found.abstract, "it takes the path of a socket, not an abstract name")
ZONED: Final = Point(_host_managed, "the disk is host-managed zoned, and it does not pass that feature on to the guest")
ONE_QUEUE: Final = Point(_lacks(ProtocolFeature.MQ), "one queue only: the back-end does not offer MQ")
NO_NEWS: Final = Point(
    _lacks(ProtocolFeature.BACKEND_REQ), "no news of a new size: the back-end does not offer BACKEND_REQ"
)

QEMU_REFUSES: Final = (NO_CONFIG, NO_CAPACITY, ZONED)
QEMU_NOTES: Final = (
    Point(
        lambda found: found.num_queues is not None,
        "num-queues may be {queues} at most; left out, it is one per virtual processor",
    ),
    Point(
        lambda found: found.num_queues is None,
        "say num-queues=1: the back-end does not offer MQ, and left out it may be one per virtual processor",
    ),
    NO_NEWS,
    Point(
        lambda found: ProtocolFeature.LOG_SHMFD not in found.protocol_features or not found.features & F_LOG_ALL,
        "no live migration: the back-end does not log writes to memory (LOG_SHMFD and LOG_ALL)",
    ),
    Point(
        lambda found: ProtocolFeature.INFLIGHT_SHMFD not in found.protocol_features,
        "requests under way are lost when the back-end is restarted: it does not offer INFLIGHT_SHMFD",
    ),
    Point(
        lambda found: bool(found.features & RingFeature.RING_RESET),
        "the back-end offers RING_RESET, and QEMU does not tell it when a guest resets a queue: the two would disagree",
    ),
)

HOSTS: Final = (
    Host("QEMU", QEMU_REFUSES, QEMU_NOTES),
    Host("libvirt", (ABSTRACT, *QEMU_REFUSES), QEMU_NOTES),
    Host("Cloud Hypervisor", (ABSTRACT, NO_CONFIG, SHORT_CONFIG, ZONED), (ONE_QUEUE,)),
    Host(
        "Firecracker",
        (ABSTRACT, NO_CONFIG, SHORT_CONFIG, ZONED),
        (
            Point(lambda found: True, "one queue of 256, and it never connects again"),
            Point(_lacks_feature(BlkFeature.FLUSH), "no flushing: cache_type must not be Writeback"),
        ),
    ),
    Host(
        "crosvm",
        (ABSTRACT, NO_CONFIG, NO_CAPACITY, WHOLE_CONFIG, ZONED),
        (Point(lambda found: True, "the virtual machine ends when the back-end does"), ONE_QUEUE, NO_NEWS),
    ),
    Host(
        "libblkio",
        (
            NO_CONFIG,
            SHORT_CONFIG,
            Point(_lacks(ProtocolFeature.REPLY_ACK), "it needs REPLY_ACK, which the back-end does not offer"),
            Point(
                _lacks(ProtocolFeature.CONFIGURE_MEM_SLOTS),
                "it needs CONFIGURE_MEM_SLOTS, which the back-end does not offer",
            ),
        ),
        (ONE_QUEUE,),
    ),
    Host(
        "SPDK",
        (
            NO_CONFIG,
            Point(
                lambda found: ProtocolFeature.CONFIG in found.protocol_features and not found.largest_config,
                f"it always asks for {LARGEST_CONFIG} bytes of the configuration, which the back-end does not answer",
            ),
        ),
        (
            Point(
                _lacks(ProtocolFeature.MQ),
                "it asks for the number of queues all the same, although the back-end does not offer MQ",
            ),
        ),
    ),
    Host(
        "Linux guests",
        (
            Point(_odd_block, "the driver takes blocks of 512 to 4096 bytes, a power of two, not of {block_size}"),
            Point(
                lambda found: bool(found.features & BlkFeature.SECURE_ERASE)
                and found.config is not None
                and not (
                    found.config.max_secure_erase_sectors
                    and found.config.max_secure_erase_seg
                    and found.config.secure_erase_sector_alignment
                ),
                "the driver does not take SECURE_ERASE with a limit or an alignment of 0",
            ),
        ),
        (
            Point(
                lambda found: bool(found.features & BlkFeature.SIZE_MAX)
                and found.config is not None
                and found.config.size_max == 0,
                "SIZE_MAX of 0 is taken for one page: every request is cut into single pages",
            ),
            Point(_lacks_feature(BlkFeature.SEG_MAX), "without SEG_MAX every request has one segment of data"),
            Point(
                _lacks_feature(BlkFeature.FLUSH),
                "without FLUSH the guest takes every write for durable once it is answered",
            ),
        ),
    ),
)  # fmt: skip
"""Whoever is known to use a virtio disk over vhost-user; the last is what sits behind most of them."""


def verdicts(found: Findings) -> list[Verdict]:
    """What each of `HOSTS` will make of a back-end, in their order."""
    facts = {"queues": found.num_queues, "block_size": found.config.blk_size if found.config is not None else 0}
    made: list[Verdict] = []
    for host in HOSTS:
        against = tuple(point.says.format(**facts) for point in host.refuses if point.applies(found))
        notes = tuple(point.says.format(**facts) for point in host.notes if point.applies(found))
        made.append(Verdict(host.name, not against, against or notes))
    return made
