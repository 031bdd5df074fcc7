"""`vhostuser serve` with a policy for errors and a rate, and the commands of the operator who decides."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

import vhostuser
from vhostuser import ControlClient, RequestFailed, Write

from .conftest import WAIT_S, Run, Serving, file_system_in_memory
from .test_failures import assert_one_line

Start = Callable[..., Serving]

MIB = 1 << 20
ONCE_FULL = "error-write=100%,errno=ENOSPC,error-limit=1"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where to serve."""
    return tmp_path / "disk.sock"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    with file_system_in_memory(tmp_path / "small", "1m") as where:
        yield where


def requests(place: Path, **wanted: object) -> list[dict[str, object]]:
    """Those in flight, once there is one like ``wanted``."""
    end = time.monotonic() + WAIT_S
    with ControlClient(f"{place}.ctl") as client:
        while True:
            answer = client.call("disk.requests")
            assert isinstance(answer, dict)
            found = answer["requests"]
            assert isinstance(found, list)
            if any(wanted.items() <= one.items() for one in found):
                return found
            assert time.monotonic() < end, f"there is no request with {wanted}, but {found}"


def test_a_held_request_is_shown_and_done_when_the_operator_says_so(serving: Start, run: Run, place: Path) -> None:
    served = serving("serve", "memory:size=1M", "--socket", str(place), "--on-enospc", "hold", "--inject", ONCE_FULL)
    with vhostuser.connect(str(place)) as client:
        write: Future[None] = client.submit(Write(4096, b"\5" * 512))
        (one,) = requests(place, state="held")
        name = f"{one['queue']}:{one['head']}"
        assert (one["type"], one["sector"], one["bytes"], one["error"]) == ("write", 8, 512, "ENOSPC")
        shown = run("vhostuser", "stats", str(place), "--inflight")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert all(word in shown.stdout for word in (name, "write", "ENOSPC", "held"))
        found = json.loads(run("vhostuser", "stats", str(place), "--inflight", "--json").stdout)
        assert found["disk"] == f"memory:size={MIB}"
        assert set(found["requests"][0]) == {"queue", "head", "type", "sector", "bytes", "age_us", "state", "error"}
        assert_one_line(
            run("vhostuser", "retry", str(place), "--request", f"{one['queue']}:{int(str(one['head'])) + 1}"), 1
        )
        assert_one_line(run("vhostuser", "retry", str(place), "--request", "first"), 1)
        assert not write.done()
        done = run("vhostuser", "retry", str(place), "--request", name)
        assert (done.returncode, done.stdout) == (0, "1 request tried again\n")
        write.result(WAIT_S)
        assert client.read(4096, 512) == b"\5" * 512
    assert run("vhostuser", "fail", str(place)).stdout == "0 requests failed\n"
    assert "queue 0: a request failed and is held" in served.log


def test_a_held_request_fails_when_the_operator_says_so(serving: Start, run: Run, place: Path) -> None:
    serving(
        "serve",
        "memory:size=1M",
        "--socket",
        str(place),
        "--on-error",
        "hold",
        "--inject",
        "error-read=1,error-limit=1",
    )
    with vhostuser.connect(str(place)) as client:
        read = client.submit(vhostuser.Read(0, 512))
        requests(place, state="held", error="EIO")
        assert run("vhostuser", "fail", str(place)).stdout == "1 request failed\n"
        with pytest.raises(RequestFailed):
            read.result(WAIT_S)
        assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("engine", ["io_uring", "syscalls"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_full_file_system_is_given_room_and_no_request_fails(
    serving: Start, run: Run, small: Path, place: Path, engine: str, cache: str
) -> None:
    image = small / "disk.img"
    image.touch()
    os.truncate(image, 4 * MIB)
    served = serving(
        *("serve", str(image), "--socket", str(place), "--on-enospc", "hold", "--engine", engine, "--cache", cache),
    )
    with vhostuser.connect(str(place)) as client:
        data = [bytes([number + 1]) * 65536 for number in range(32)]
        writes = client.submit_all([Write(number * 65536, one) for number, one in enumerate(data)])
        requests(place, state="held", error="ENOSPC")
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        end = time.monotonic() + WAIT_S
        while not all(write.done() for write in writes):  # those that fail while it is remounted are held later
            assert run("vhostuser", "retry", str(place)).returncode == 0
            assert time.monotonic() < end
        assert all(write.exception() is None for write in writes)
        client.flush()
        assert [client.read(number * 65536, 65536) for number in range(32)] == data
    assert "No space left on device" in served.log


def test_a_write_that_must_be_stable_is_never_held_in_the_page_cache(serving: Start, small: Path, place: Path) -> None:
    image = small / "disk.img"
    image.touch()
    os.truncate(image, 4 * MIB)
    served = serving(
        "serve", str(image), "--socket", str(place), "--on-enospc", "hold", "--cache", "writethrough"
    )  # fmt: skip
    with vhostuser.connect(str(place)) as client, pytest.raises(RequestFailed):
        client.write(0, bytes(2 * MIB))
    assert "with --cache writethrough a failed write is always told to the guest" in served.log


def test_a_retried_request_needs_no_operator(serving: Start, run: Run, place: Path) -> None:
    serving("serve", "memory:size=1M", "--socket", str(place), "--on-enospc", "retry", "--inject", ONCE_FULL)
    with vhostuser.connect(str(place)) as client:
        client.write(0, b"\1" * 512)
    queues = json.loads(run("vhostuser", "stats", str(place), "--json").stdout)["queues"]
    assert sum(queue["retried"] for queue in queues) == 1


def test_the_guest_is_told_when_the_time_for_retries_is_over(serving: Start, place: Path) -> None:
    serving(
        *("serve", "memory:size=1M", "--socket", str(place), "--on-error", "retry", "--retry-for", "0.05"),
        *("--inject", "error-write=1"),
    )
    with vhostuser.connect(str(place)) as client, pytest.raises(RequestFailed):
        client.write(0, bytes(512))


def test_a_rate_limit_is_told_changed_and_lifted(serving: Start, run: Run, place: Path) -> None:
    serving("serve", "memory:size=1M", "--socket", str(place), "--rate-limit", "iops=1K,bps=1K")
    assert run("vhostuser", "limit", str(place)).stdout == "iops=1024,bps=1024\n"
    with vhostuser.connect(str(place)) as client:
        client.write(0, bytes(65536))  # a minute's worth: what comes next waits
        write = client.submit(Write(0, bytes(512)))
        assert run("vhostuser", "limit", str(place), "iops=1000").stdout == "iops=1000\n"
        write.result(WAIT_S)
    assert run("vhostuser", "limit", str(place), "none").stdout == "none\n"
    assert_one_line(run("vhostuser", "limit", str(place), "much"), 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--on-error", "panic"), "--on-error: 'panic' is not one of"),
        (("--rate-limit", "fast"), "rate limit 'fast': this is no limit"),
        (("--retry-for", "5"), "--retry-for: nothing is tried again"),
        (("--on-error", "retry", "--retry-for", "0"), "retry-for 0: it must be more than 0 s"),
        (("--inject", "errno=NONE"), "inject 'errno=NONE': is not the name of an error"),
        (("--inject", "error-limit=some"), "inject 'error-limit=some': is not a number of requests"),
    ],
)
def test_options_that_make_no_sense_are_one_line(run: Run, place: Path, options: tuple[str, ...], said: str) -> None:
    done = run("vhostuser", "serve", "memory:size=1M", "--socket", str(place), *options)
    assert_one_line(done, 2)
    assert said in done.stderr
