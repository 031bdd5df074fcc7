"""The command lines of what is compared."""

from __future__ import annotations

import socket
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.results import BARE, OURS, PEER
from benchmarks.servers import Offer, listening

CACHED, DIRECT = Case("tmpfs", "randread", 1), Case("direct", "randread", 1)
TWO = Case("tmpfs", "randread", 1, queues=2)
IMAGE, SOCKET = Path("/i/disk.img"), Path("/s/disk.sock")


def offer(peer: str | None) -> Offer:
    return Offer(["vhostuser"], Path("bare"), peer, core=1)


def test_a_peer_takes_part_where_it_can_do_what_is_asked() -> None:
    assert offer(None).names(CACHED) == [OURS, BARE]
    assert offer("p {image} {socket}").names(CACHED) == [OURS, PEER, BARE]
    assert offer("p {image} {socket}").names(DIRECT) == [OURS, BARE]
    assert offer("p {image} {socket} {direct}").names(DIRECT) == [OURS, PEER, BARE]
    assert offer("p {image} {socket}").names(TWO) == [OURS]
    assert offer("p {image} {socket} {queues}").names(TWO) == [OURS, PEER]
    assert offer("p {image} {socket}").names(Case("null", "randread", 1)) == [OURS, BARE]


def test_places_in_the_command_of_a_peer_are_filled_in() -> None:
    words = offer("p 'a b' --file={image},direct={direct} -q {queues} {socket}").words(PEER, DIRECT, IMAGE, SOCKET)
    assert words == ["p", "a b", "--file=/i/disk.img,direct=on", "-q", "1", "/s/disk.sock"]


def test_all_go_around_the_cache_or_none() -> None:
    ours, bare = (offer(None).words(name, DIRECT, IMAGE, SOCKET) for name in (OURS, BARE))
    assert ours[-2:] == ["--cache", "none"]
    assert {"--direct", "uring"} <= set(bare)
    ours, bare = (offer(None).words(name, CACHED, IMAGE, SOCKET) for name in (OURS, BARE))
    assert "--cache" not in ours
    assert "--direct" not in bare


def test_a_socket_listens_only_once_it_listens(tmp_path: Path) -> None:
    place = tmp_path / "disk.sock"
    assert not listening(place)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
        assert not listening(place)
        server.listen()
        assert listening(place)
    assert not listening(place)
