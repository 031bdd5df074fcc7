"""The two bits of a ring, and its plan: pure, so everything is tried."""

from __future__ import annotations

import itertools

import pytest
from tests.backend.fakes import addr_of

from vhostuser.backend import RingEvent, RingPlan, RingState

STATES = [RingState(started, enabled) for started, enabled in itertools.product((False, True), repeat=2)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", RingEvent)
def test_an_event_decides_its_bits_and_leaves_the_others(state: RingState, event: RingEvent) -> None:
    after = state.after(event)
    match event:
        case RingEvent.KICK:
            assert after == RingState(True, state.enabled)
        case RingEvent.GET_BASE:
            assert after == RingState(False, state.enabled)
        case RingEvent.ENABLE | RingEvent.NO_PROTOCOL_FEATURES:
            assert after == RingState(state.started, True)
        case RingEvent.DISABLE:
            assert after == RingState(state.started, False)
        case RingEvent.RESET:
            assert after == RingState(False, False)


def test_a_ring_begins_stopped_and_disabled() -> None:
    assert RingState() == RingState(started=False, enabled=False)


@pytest.mark.parametrize("parts", list(itertools.product((False, True), repeat=4)))
def test_a_plan_names_exactly_what_is_missing(parts: tuple[bool, ...]) -> None:
    num, addr, kick, memory = parts
    plan: RingPlan[str] = RingPlan(num=8 if num else None, addr=addr_of(0) if addr else None, kicked=kick)
    names = ("SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_KICK", "SET_MEM_TABLE")
    assert plan.missing(memory=memory) == tuple(name for name, there in zip(names, parts, strict=True) if not there)


def test_base_call_and_err_are_optional() -> None:
    plan: RingPlan[str] = RingPlan(num=8, addr=addr_of(0), kicked=True)
    assert plan.missing(memory=True) == ()
    assert (plan.base, plan.kick, plan.call, plan.err) == (0, None, None, None)


def test_a_stop_keeps_everything_but_the_kick() -> None:
    plan = RingPlan(num=8, addr=addr_of(0), base=3, kicked=True, kick="kick", call="call", err="err")
    assert plan.stopped(9) == RingPlan(num=8, addr=addr_of(0), base=9, call="call", err="err")


def test_a_reset_keeps_only_call_and_err() -> None:
    plan = RingPlan(num=8, addr=addr_of(0), base=3, kicked=True, kick="kick", call="call", err="err")
    assert plan.reset() == RingPlan(call="call", err="err")
