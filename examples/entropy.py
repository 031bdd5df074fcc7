"""A device that is no disk: random bytes for a guest (virtio: Entropy Device).

python examples/entropy.py /tmp/rng.sock
qemu-system-x86_64 ... -chardev socket,id=rng,path=/tmp/rng.sock -device vhost-user-rng-pci,chardev=rng
"""

from __future__ import annotations

import os
import sys
import threading

from vhostuser import ChainQueues, Device, RingFeature, Server, listen

MAX_BYTES = 65536
"""What one chain gets at most: a guest may ask for as much as it has memory."""


class Entropy(Device):
    """One queue; every chain on it is room to fill."""

    device_id = 4
    name = "entropy"
    features = int(RingFeature.VERSION_1 | RingFeature.INDIRECT_DESC | RingFeature.EVENT_IDX)
    queues = ChainQueues(num_queues=1)

    def fill(self) -> None:
        """Serve chains until the device is closed. Runs on a thread of its own."""
        while (chain := self.queues.take(0)) is not None:
            chain.write(os.urandom(min(chain.writable, MAX_BYTES)))
            chain.complete()


def main(path: str) -> None:
    """Serve one guest after another until interrupted."""
    device = Entropy()
    filler = threading.Thread(target=device.fill)
    filler.start()
    try:
        server = Server(device, listen(path))
        print(f"serving on {path}", flush=True)
        server.run()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        device.close()
        filler.join()


if __name__ == "__main__":
    main(sys.argv[1])
