"""A disk served from Python that grows while its guest runs: each line of input is a new size.

python examples/growing_disk.py disk.img /tmp/disk.sock
"""

from __future__ import annotations

import sys

from vhostuser import BlockDevice, Server, VhostUserError, listen, open_disk, parse_size


def main(image: str, path: str) -> None:
    """Serve until the end of the input."""
    with open_disk(image) as disk:
        device = BlockDevice(disk, num_queues=4, serial="growing")
        with Server(device, listen(path)):
            print(f"serving {device.size} bytes on {path}", flush=True)
            for line in sys.stdin:
                try:
                    notice = device.resize(parse_size(line))
                except (VhostUserError, OSError) as error:
                    print(error, flush=True)
                else:
                    print(f"{device.size} bytes: {notice.value}", flush=True)
        reads = sum(queue["reads"] for queue in device.statistics())
        device.close()
        print(f"the guest made {reads} reads")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
