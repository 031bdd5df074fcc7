"""The pure connection: any bytes with any descriptors, in any pieces, for either end. Touches nothing.

Only `RemoteProtocolError` may come of what a peer sent; every descriptor comes out again exactly once.
"""

from __future__ import annotations

from tests.fuzz.choices import Choices
from tests.fuzz.messages import message

from vhostuser.errors import LocalProtocolError, RemoteProtocolError
from vhostuser.protocol import (
    U64,
    Connection,
    FrontendRequest,
    Message,
    Refused,
    Reply,
    Role,
    Violation,
    describe,
    rule_of,
)
from vhostuser.protocol.messages import identify


def one(data: bytes) -> None:
    """Plays one input."""
    choices = Choices(data)
    role = choices.pick((Role.BACKEND, Role.BACKEND, Role.BACKEND, Role.FRONTEND))
    connection: Connection[str] = Connection(role, nested=choices.number() % 8 == 7)
    given: list[str] = []
    back: list[str] = []
    try:
        while choices and not connection.closed:
            if role is Role.FRONTEND or connection.nested:
                ask(connection, choices)
            stream = message(choices)[1] if choices.number() % 8 else choices.take(choices.number())
            while stream:
                piece = stream[: choices.pick((connection.want or 1, connection.want or 1, 1, 7, len(stream)))]
                stream = stream[len(piece) :]
                fds = [f"fd{len(given) + number}" for number in range(choices.pick((0, 0, 1, 2, 8, 33)))]
                given += fds
                connection.receive(piece, fds)
                answer_all(connection, choices, back)
        connection.receive(b"")
        answer_all(connection, choices, back)
    except RemoteProtocolError:
        assert connection.closed
    connection.close()
    assert connection.want == 0
    assert connection.next_event() is None
    back += connection.refused_fds()
    assert sorted(back) == sorted(given), "a descriptor is lost, or came twice"


def ask(connection: Connection[str], choices: Choices) -> None:
    """Lets our end ask something, if that is legal now."""
    request = identify(choices.number() % 48, nested=connection.nested)
    try:
        payload = rule_of(request).payload.unpack(choices.take(choices.number()))
        connection.send(Message(request, payload, (), need_reply=choices.number() % 2 == 1))
    except (LocalProtocolError, Violation):
        return


def answer_all(connection: Connection[str], choices: Choices, back: list[str]) -> None:
    """Takes what came, and answers as a back-end does that may also refuse."""
    while True:
        try:
            event = connection.next_event()
        finally:
            back += connection.refused_fds()
        match event:
            case None:
                return
            case Message() | Refused():
                if isinstance(event, Message):
                    back += event.fds
                    assert describe(event)
                bad = (
                    isinstance(event, Refused) or choices.number() % 16 == 15 or not settle(connection, event, choices)
                )
                if bad and connection.acknowledge(event, 1) is None:
                    connection.close()  # nothing else tells the peer
                    return
            case Reply():
                back += event.fds
                assert describe(event)


def settle(connection: Connection[str], event: Message[str], choices: Choices) -> bool:
    """Answers a good message; False when it has an own reply that this does not know to make."""
    reply = rule_of(event.request).under(connection.protocol_features).reply
    if reply is None:
        try:
            connection.acknowledge(event)
        except LocalProtocolError:
            assert event.request in (FrontendRequest.SET_MEM_TABLE, FrontendRequest.ADD_MEM_REG)
            return False  # postcopy gave it an own reply
        return True
    if reply is U64:
        connection.answer(event, U64(choices.number(8)))
        return True
    return False
