"""What an operator may ask about a served disk over its control socket. Touches the device.

The functions are called from the threads of the control socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostuser.disks.registry import parse_size
from vhostuser.jsonrpc import INVALID_PARAMS, ControlError, Method, Params, only
from vhostuser.request_methods import request_methods

if TYPE_CHECKING:
    from vhostuser.blk.device import BlockDevice


def disk_methods(device: BlockDevice, *, version: str) -> dict[str, Method]:
    """The methods about one disk: ``disk.info``, ``disk.stats``, ``disk.resize`` and ``server.version``, and those of
    `request_methods`."""

    def info(params: Params) -> object:
        only(params)
        return device.info()

    def stats(params: Params) -> object:
        only(params)
        return {"queues": device.statistics()}

    def resize(params: Params) -> object:
        only(params, "size")
        size = params.get("size")
        if isinstance(size, str):
            size = parse_size(size)
        if size is None:
            notice = device.refresh()
        elif isinstance(size, int) and not isinstance(size, bool) and size >= 0:
            notice = device.resize(size)
        else:
            raise ControlError(INVALID_PARAMS, "size is a number of bytes, or a text like 10G")
        told = "unchanged" if notice is None else notice.name.lower()
        return {"size": device.size, "notice": told, "message": notice.value if notice else "the size is what it was"}

    def server_version(params: Params) -> object:
        only(params)
        return {"name": "vhostuser", "version": version}

    own: dict[str, Method] = {
        "disk.info": info, "disk.stats": stats, "disk.resize": resize, "server.version": server_version,
    }  # fmt: skip
    return own | request_methods(device)
