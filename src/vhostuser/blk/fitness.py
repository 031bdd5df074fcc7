"""What a back-end has to be to be driven, and to go on where another one stopped. Touches the device it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostuser.blk.limits import MAX_REQUEST_BYTES, DiskLimits, shrunk
from vhostuser.blk.options import CONFIG_SIZES, Options
from vhostuser.errors import BackendRefused, BackendUnfit
from vhostuser.virtio.blk import BlkFeature, VirtioBlkConfig
from vhostuser.virtio.features import feature_names

if TYPE_CHECKING:
    from vhostuser.frontend.client import HostDevice
    from vhostuser.frontend.configuration import ConfigListener


def first_config(device: HostDevice, listener: ConfigListener) -> bytes:
    """As much of the configuration as the back-end tells, watched from now on. Raises `BackendUnfit` if it is none."""
    refused: BackendRefused | None = None
    for size in CONFIG_SIZES:
        try:
            return device.watch_config(size, listener)
        except BackendRefused as error:
            refused = error
    raise BackendUnfit(
        device.name, f"it does not tell its configuration: {refused}", "Report it to the makers of the back-end"
    )


def check_queues(device: HostDevice, options: Options) -> None:
    """Raise `BackendUnfit` when it has fewer queues than are asked for."""
    if options.queues > device.max_queues:
        raise BackendUnfit(
            device.name,
            f"it has {device.max_queues} queues and {options.queues} were asked for",
            "Ask for fewer, or start the back-end with more",
        )


def limits_of(device: HostDevice, config: VirtioBlkConfig, options: Options) -> DiskLimits:
    """What its requests have to keep to. Raises `BackendUnfit` for what cannot be driven."""
    size = options.queue_size
    return DiskLimits.of(device.name, device.features, config, queue_size=size, max_bytes=MAX_REQUEST_BYTES)


def check_as_before(device: HostDevice, features: int, before: DiskLimits, now: DiskLimits) -> None:
    """Raise `BackendUnfit` when requests that keep to ``features`` and the limits of ``before`` may fail here."""
    _check_writable(device, features)
    if lacking := shrunk(before, now):
        raise another(device, lacking)


def check_same_features(device: HostDevice, features: int) -> None:
    """Raise `BackendUnfit` when it does not offer all of ``features``, which the rings use already."""
    _check_writable(device, features)
    if lacking := features & ~device.features:
        raise another(device, f"it does not offer what the rings use: {' '.join(feature_names(lacking, BlkFeature))}")


def _check_writable(device: HostDevice, features: int) -> None:
    if device.features_offered & BlkFeature.RO and not features & BlkFeature.RO:
        raise another(device, "it can only be read now")


def another(device: HostDevice, cause: str) -> BackendUnfit:
    """The error of a back-end that offers less than the one before."""
    return BackendUnfit(device.name, cause, "Start the one that was there before, with the same options")
