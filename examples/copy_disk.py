"""Copies a file onto the disk behind a vhost-user socket, many requests at a time, without copies in memory.

python examples/copy_disk.py disk.img /tmp/disk.sock
"""

from __future__ import annotations

import sys
from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack

from vhostuser import Buffer, Write, connect

CHUNK = 1 << 20
DEPTH = 8


def main(image: str, socket: str) -> None:
    """Copy, make it durable, and say how much it was."""
    with connect(socket) as disk, open(image, "rb", buffering=0) as file, ExitStack() as stack:
        free = [stack.enter_context(disk.allocate(CHUNK)) for _ in range(DEPTH)]
        writing: deque[tuple[Buffer, Future[None]]] = deque()
        offset = 0
        while True:
            if not free:  # wait for the oldest, and use its buffer again
                buffer, done = writing.popleft()
                done.result()
                free.append(buffer)
            buffer = free.pop()
            length = file.readinto(buffer.view)  # straight into memory that the back-end reads
            if not length:
                break
            padding = -length % disk.block_size  # a disk is written in whole blocks
            buffer.view[length : length + padding] = bytes(padding)
            writing.append((buffer, disk.submit(Write(offset, buffer[: length + padding]))))
            offset += length
        for _, done in writing:
            done.result()
        disk.flush()
        print(f"{offset} bytes copied")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
