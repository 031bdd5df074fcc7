"""The SHA-256 of the disk behind a vhost-user socket, with many reads under way while it is computed.

python examples/checksum.py /tmp/disk.sock
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections import deque

from vhostuser import Read, connect_async

CHUNK = 1 << 20
DEPTH = 8


async def checksum(socket: str) -> str:
    """Read everything in order, `DEPTH` chunks ahead."""
    digest = hashlib.sha256()
    async with await connect_async(socket) as disk:
        reads: deque[asyncio.Future[bytes]] = deque()
        for offset in range(0, disk.size, CHUNK):
            length = min(CHUNK, disk.size - offset)
            reads.append(disk.submit(Read(offset, length)))
            if len(reads) == DEPTH:
                digest.update(await reads.popleft())
        for read in reads:
            digest.update(await read)
    return digest.hexdigest()


if __name__ == "__main__":
    print(asyncio.run(checksum(sys.argv[1])), sys.argv[1])
