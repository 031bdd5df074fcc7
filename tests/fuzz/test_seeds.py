"""What fuzzing has found, and the inputs it starts with, as ordinary tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.fuzz import connection, session
from tests.fuzz.seeds import seeds_of


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
