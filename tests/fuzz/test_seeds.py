"""What fuzzing has found, and the inputs it starts with, as ordinary tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.fuzz import connection, session
from tests.fuzz.seeds import conversations, recorded, seeds_of


@pytest.fixture
def _stage() -> Iterator[None]:
    yield
    session.STAGE.close()


def test_a_connection_gives_every_descriptor_back_whatever_comes() -> None:
    for data in seeds_of("connection"):
        connection.one(data)


@pytest.mark.usefixtures("_stage")
def test_a_session_leaves_nothing_behind_whatever_comes() -> None:
    for data in seeds_of("session"):
        session.one(data)


@pytest.mark.usefixtures("_stage")
@pytest.mark.parametrize("name", conversations())
def test_what_a_real_front_end_said_is_carried_out_to_its_end(name: str) -> None:
    session.one(recorded(conversations()[name]))
    assert session.COMPLAINTS.last.endswith(": the front-end has left")


@pytest.mark.usefixtures("_stage")
def test_what_the_fuzzer_sets_up_is_served() -> None:
    before = session.STAGE.device().queues.stats()[0]["kicks"]
    session.one(bytes((0, 0, 255, 0, 3, 3)))
    assert session.STAGE.device().queues.stats()[0]["kicks"] > before
