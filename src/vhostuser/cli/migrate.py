"""`vhostuser migrate`: moves a disk between two back-ends under load, and says what it took. Touches: both of them."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from vhostuser.cli import failures, reaching
from vhostuser.errors import OperatorError

if TYPE_CHECKING:
    from vhostuser.blk.client import BlockClient
    from vhostuser.blk.migration import Migration

BLOCK = 4096
MAX_DEPTH = 64


@click.command("migrate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.argument("destination")
@click.option("--rounds", type=click.IntRange(0, 10_000), default=4, show_default=True, help="Copies before the stop.")
@click.option("--there-and-back", type=click.IntRange(1, 10_000), metavar="N", help="So often, instead of once there.")
@click.option("--queues", type=click.IntRange(1, 256), default=1, show_default=True, help="Queues to use.")
@click.option("--depth", type=click.IntRange(1, MAX_DEPTH), default=4, show_default=True, help="Requests at a time.")
@click.option("--write", is_flag=True, help="Overwrite the disk, and verify. Without it the disk is only read.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@reaching.timeout_option
@failures.verbose_option
def command(
    source: str, destination: str, rounds: int, there_and_back: int | None, queues: int, depth: int, write: bool,
    as_json: bool, timeout_s: float,
) -> None:  # fmt: skip
    """Move the disk behind SOURCE to DESTINATION while it is used, as a live migration does, without a virtual machine.

    Both are sockets of back-ends that serve the same storage. Fails when the destination refuses, and when the source
    wrote a page of memory that it did not log: a virtual machine would lose what is on it.
    """
    from vhostuser import Backoff, connect

    places = (destination, source) * there_and_back if there_and_back else (destination,)
    moves: list[Migration] = []
    with reaching.reaching(source):
        client = connect(source, queues=queues, timeout_s=timeout_s, reconnect=Backoff(give_up_s=timeout_s))
        with client, Load(client, depth, write=write) as load:
            for place in places:
                moves.append(client.migrate(place, rounds=rounds))
    if as_json:
        print(json.dumps({"moves": [asdict(move) for move in moves], "requests": load.requests, "written": write}))
        return
    print("to                    pages in rounds         downtime   under way  carried  state")
    for move in moves:
        pages = "+".join(str(count) for count in move.rounds)
        state = "-" if move.state_bytes is None else f"{move.state_bytes} B"
        down = f"{move.downtime_s * 1000:.1f} ms"
        print(f"{move.destination:20}  {pages:22}  {down:9}  {move.outstanding:9}  {move.carried:7}  {state}")
    print(f"{load.requests} requests answered meanwhile; every page that was written was logged")


class Load:
    """Threads that read the disk, or overwrite their own blocks of it and verify them, until the block ends."""

    def __init__(self, client: BlockClient, depth: int, *, write: bool) -> None:
        self._client, self._write = client, write
        self._block = max(BLOCK, client.block_size)
        self._blocks = client.size // self._block // depth
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._counts = [0] * depth
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(depth)]

    @property
    def requests(self) -> int:
        """How many were answered."""
        return sum(self._counts)

    def __enter__(self) -> Load:
        if not self._blocks:
            raise OperatorError("the disk", "it is too small for so many requests at a time", "Ask for a lower --depth")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._failures and kind is None:
            raise self._failures[0]

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        try:
            while not self._stop.is_set():
                offset = (number * self._blocks + rng.randrange(self._blocks)) * self._block
                if self._write:
                    data = rng.randbytes(self._block)
                    self._client.write(offset, data)
                    if self._client.read(offset, self._block) != data:
                        cause = f"{self._block} bytes at {offset} are not what was written there"
                        raise OperatorError("the disk", cause, "See whether both back-ends serve the same storage")
                    self._counts[number] += 1
                else:
                    self._client.read(offset, self._block)
                self._counts[number] += 1
        except BaseException as error:
            self._failures.append(error)
