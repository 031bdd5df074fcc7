"""Kills any back-end at random, starts it again, and judges what a verifying load sees meanwhile.

``python -m tests.survival --kills 500 -- vhostuser serve {image} --socket {socket}``: ``{image}`` in the command stands
for an image of zeroes, ``{socket}`` for where the back-end is to listen. With ``--untracked`` calls may fail: for a
back-end without in-flight tracking. What was acknowledged must survive all the same.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.survival.load import Load
from tests.survival.model import BLOCK, Violation
from tests.survival.supervisor import Moments, Supervisor

import vhostuser
from vhostuser.frontend import Backoff

BLOCKS: Final = 256
LIMIT_S: Final = 60.0
QUICK: Final = Backoff(first_s=0.002, factor=1.5, most_s=0.02, give_up_s=LIMIT_S)


class Report:
    """What came of a number of kills."""

    def __init__(self) -> None:
        self.kills = self.answered = self.failed = 0
        self.outages_s: list[float] = []

    def __str__(self) -> str:
        if not self.outages_s:
            return f"{self.kills} kills, {self.answered} requests answered, {self.failed} failed"
        middle, longest = statistics.median(self.outages_s), max(self.outages_s)
        return (
            f"{self.kills} kills, {self.answered} requests answered, {self.failed} failed; "
            f"from the kill to the next answer {middle * 1000:.0f} ms (median), {longest * 1000:.0f} ms (longest)"
        )


def connect_in_time(path: Path, **options: int) -> vhostuser.BlockClient:
    """Connect as soon as somebody listens there."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return vhostuser.connect(path, reconnect=QUICK, request_timeout_s=LIMIT_S, **options)  # type: ignore[arg-type]
        except vhostuser.VhostUserError:
            if time.monotonic() > deadline:
                raise


def kill_at_random(
    supervisor: Supervisor, path: Path, image: Path, kills: int, *, seed: int, tracked: bool = True, queues: int = 1,
    depth: int = 32,
) -> Report:  # fmt: skip
    """Kill the back-end ``kills`` times under load. ``image``, of `BLOCKS` blocks, holds zeroes. Raises `Violation`."""
    moments, report = Moments(seed), Report()
    supervisor.start()
    with connect_in_time(path, queues=queues) as disk:
        load = Load(disk, BLOCKS, depth, seed, tracked=tracked)
        for _ in range(kills):
            answers, delay_s = moments.next()
            enough = load.answered + answers
            give_up = time.monotonic() + LIMIT_S
            while load.answered < enough:
                load.fill()
                if not load.settle(LIMIT_S) or time.monotonic() > give_up:
                    raise Violation(f"no answer within {LIMIT_S:g} s")
            until = time.monotonic() + delay_s
            while (left := until - time.monotonic()) > 0:
                load.fill()
                load.settle(left)
            load.fill()
            killed = time.monotonic()
            supervisor.kill(hurry=moments.hurry())
            supervisor.start()
            if answers:
                _await_answer(load)
                report.outages_s.append(time.monotonic() - killed)
        _await_answer(load)
        load.finish(LIMIT_S)
        load.read_all()
        report.answered, report.failed = load.answered, load.failed
    supervisor.kill()
    report.kills = kills
    load.model.check_image(image.read_bytes())
    return report


def _await_answer(load: Load) -> None:
    """Keep the load up until the back-end that is there now has answered something."""
    while load.settle(0):  # what another one had answered before
        pass
    before = load.answered
    while load.answered == before:
        load.fill()
        if not load.settle(LIMIT_S):
            raise Violation(f"no answer within {LIMIT_S:g} s")


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tests.survival", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--queues", type=int, default=1)
    parser.add_argument("--depth", type=int, default=32, help="requests under way")
    parser.add_argument("--untracked", action="store_true", help="calls may fail")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    logging.getLogger("vhostuser").setLevel(logging.ERROR)  # that connections are lost is what is wanted here
    with tempfile.TemporaryDirectory(prefix="survival-") as name:
        place = Path(name)
        image, path = place / "disk.img", place / "disk.sock"
        image.write_bytes(bytes(BLOCK * BLOCKS))
        words = options.command[1:] if options.command[:1] == ["--"] else options.command
        command = [word.replace("{image}", str(image)).replace("{socket}", str(path)) for word in words]
        with Supervisor(command, place) as supervisor:
            try:
                report = kill_at_random(
                    supervisor, path, image, options.kills, seed=options.seed, tracked=not options.untracked,
                    queues=options.queues, depth=options.depth,
                )  # fmt: skip
            except (Violation, vhostuser.VhostUserError) as error:
                print(f"survival: after {supervisor.kills} kills: {error}", file=sys.stderr)
                print((place / "backend.log").read_text()[-2000:], file=sys.stderr)
                return 1
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
