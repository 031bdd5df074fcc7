"""What an operator may ask about single requests and their rate over the control socket. Touches the device."""

from __future__ import annotations

import errno
from dataclasses import asdict
from typing import TYPE_CHECKING

from vhostuser.blk.policy import RateLimit
from vhostuser.errors import OperatorError
from vhostuser.jsonrpc import INVALID_PARAMS, ControlError, Method, Params, only

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhostuser.blk.device import BlockDevice


def request_methods(device: BlockDevice) -> dict[str, Method]:
    """``disk.requests``, ``disk.retry``, ``disk.fail`` and ``disk.limit``."""

    def requests(params: Params) -> object:
        only(params)
        return {
            "requests": [
                {
                    "queue": one.queue,
                    "head": one.head,
                    "type": one.kind,
                    "sector": one.sector,
                    "bytes": one.bytes,
                    "age_us": one.age_us,
                    "state": one.state,
                    "error": errno.errorcode.get(one.errno, str(one.errno)) if one.errno else None,
                }
                for one in device.requests()
            ]
        }

    def decided(decide: Callable[[tuple[int, int] | None], int]) -> Method:
        def method(params: Params) -> object:
            only(params, "requests")
            names = params.get("requests")
            if names is None:
                return {"requests": decide(None)}
            if not isinstance(names, list):
                raise ControlError(INVALID_PARAMS, 'requests is a list of names like "0:17" (queue and head)')
            chosen = [_request(name) for name in names]
            for place in chosen:
                if decide(place) == 0:
                    raise OperatorError(
                        f"request {place[0]}:{place[1]}",
                        "it is not kept: it was answered, or is just being tried",
                        "Look with stats --inflight which are",
                    )
            return {"requests": len(chosen)}

        return method

    def limit(params: Params) -> object:
        only(params, "iops", "bps")
        if params:
            chosen = {name: _rate(name, value) for name, value in params.items()}
            device.rate_limit = RateLimit(**(asdict(device.rate_limit) | chosen))
        return asdict(device.rate_limit)

    return {
        "disk.requests": requests,
        "disk.retry": decided(device.retry),
        "disk.fail": decided(device.fail),
        "disk.limit": limit,
    }


def _request(name: object) -> tuple[int, int]:
    queue, colon, head = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (colon and queue.isdecimal() and head.isdecimal() and int(queue) < 1 << 16 and int(head) < 1 << 16):
        raise ControlError(INVALID_PARAMS, f'{name!r} names no request: write queue and head like "0:17"')
    return int(queue), int(head)


def _rate(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ControlError(INVALID_PARAMS, f"{name} is a number a second, 0 for no limit")
    return value
