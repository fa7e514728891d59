"""Requests that would miss their TTFT objective: refused where their class says so, else passed by those that would
not."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from math import inf
from typing import Any

import pytest

from splitserve.core.errors import Limit, Overloaded, Unavailable
from splitserve.core.worker import Pool, StepCost
from splitserve.routing.route import Need
from tests.unit.router.room import Room, settled
from tests.unit.router.scripted import worker_info

TOKEN_S = 0.01
COST = StepCost(
    fixed_s=0.0,
    prefill_fixed_s=0.0,
    token_s=TOKEN_S,
    token_break=inf,
    token_more_s=0.0,
    pair_s=0.0,
    chunk_s=0.0,
    decode_s=0.001,
    decode_break=inf,
    decode_more_s=0.0,
    context_s=0.0,
    stages=1,
)
MEASURED = worker_info("d0", Pool.DECODE, step_cost=COST)
UNKNOWN = worker_info("d1", Pool.DECODE)
ALONE_S = 40 * TOKEN_S


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    async with Room.open() as room:
        yield room


async def ask(room: Room, name: str, due_in_s: float, refuses: bool = True, priority: int = 0, **need: Any) -> None:
    """One of 40 tokens."""
    wanted = replace(Need(40, due=room.now + due_in_s), **need)
    late = "tight" if refuses else ""
    await room.ask(name, priority, room.now, need=wanted, first_token_s=due_in_s, refuses_late=late)


async def refusal(room: Room) -> Overloaded:
    """Of the latest."""
    with pytest.raises(Overloaded) as refused:
        await room.ended()
    assert refused.value.limit is Limit.SLO_CLASS
    return refused.value


# Refused ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("avoid", [frozenset(), frozenset({"gone"})], ids=["any worker", "some workers only"])
async def test_who_would_be_late_even_now_is_refused_at_once(room: Room, avoid: frozenset[str]) -> None:
    room.grant(MEASURED)
    await ask(room, "hopeless", 0.9 * ALONE_S, avoid=avoid)
    refused = await refusal(room)
    assert str(refused).startswith("slo_class tight: the first token would come later than the 0.36 s it allows")
    assert refused.retry_after_s == 0.5
    await ask(room, "in time", 2 * ALONE_S, avoid=avoid)
    await settled()
    assert room.bound == ["in time"]


async def test_what_is_refused_leaves_nothing_behind(room: Room) -> None:
    room.grant(MEASURED)
    before = room.fleet.candidates(0.0)[0].load
    await ask(room, "hopeless", 0.9 * ALONE_S)
    await refusal(room)
    assert len(room.waiting) == 0
    assert room.fleet.candidates(0.0)[0].load == before


async def test_who_waits_for_the_queue_to_move_is_refused_before_it_is_late(room: Room) -> None:
    """The queue moves by one in ten seconds: whoever has three before it has its turn after thirty."""
    await room.moves_on(UNKNOWN, 10.0, requests=100)
    for name in ("first", "second", "third"):
        await ask(room, name, 1000.0)
    assert len(room.waiting) == 3
    await ask(room, "no turn in time", 29.0, priority=1)
    refused = await refusal(room)
    assert "3 requests are waiting" in str(refused)
    assert refused.retry_after_s == pytest.approx(15.0, rel=1e-3)
    await ask(room, "has its turn", 31.0, priority=1)
    await ask(room, "goes first", 29.0, priority=-1)
    assert len(room.waiting) == 5


async def test_those_that_wait_for_a_certain_worker_count_too(room: Room) -> None:
    await room.moves_on(UNKNOWN, 10.0, requests=100)
    for name in ("first", "second", "third"):
        await ask(room, name, 1000.0, avoid=frozenset({f"not {name}"}))
    assert len(room.waiting) == 3
    await ask(room, "no turn in time", 29.0, priority=1)
    await refusal(room)


async def test_who_is_due_while_nothing_is_free_is_refused_then(room: Room) -> None:
    room.grant(UNKNOWN, free_sequences=0)
    await ask(room, "due", 0.01)
    await ask(room, "not yet", 1000.0)
    with pytest.raises(Overloaded, match="slo_class tight"):
        await room.ended(0)
    assert not room.tasks[1].done()
    assert len(room.waiting) == 1


async def test_who_is_to_be_refused_lets_nobody_pass_first(room: Room) -> None:
    room.grant(MEASURED, free_sequences=0)
    await ask(room, "hopeless", 100.0)
    room.now = 100.0 - 0.9 * ALONE_S
    await ask(room, "in time", 5.0)
    room.grant(MEASURED, free_sequences=1)
    with pytest.raises(Overloaded, match="slo_class tight"):
        await room.ended(0)
    await settled()
    assert room.bound == ["in time"]


async def test_a_late_request_waits_where_its_class_says_so(room: Room) -> None:
    room.grant(MEASURED, free_sequences=0)
    await ask(room, "late", 0.01, refuses=False)
    room.now += 10.0
    room.grant(MEASURED)
    await settled()
    assert room.bound == ["late"]


async def test_a_request_that_was_served_before_is_never_refused(room: Room) -> None:
    await room.moves_on(UNKNOWN, 1.0, requests=100)
    for name in ("first", "second"):
        await ask(room, name, 100.0, refuses=False)
    served = {"refuses_late": "tight", "failed_with": Unavailable("d9 is gone"), "first_token_s": 1e-9}
    await room.ask("third", priority=1, arrived_at=room.now, need=Need(40, due=room.now - 5.0), **served)
    await asyncio.sleep(0.01)
    room.grant(UNKNOWN, free_sequences=8)
    await settled()
    assert room.bound[-3:] == ["first", "second", "third"]


# In which order -----------------------------------------------------------------------------------------------------
async def test_requests_go_by_their_classes_priority_and_then_by_when_they_are_due(room: Room) -> None:
    room.grant(MEASURED, free_sequences=0)
    await ask(room, "batch", 1.0, refuses=False, priority=10)
    await ask(room, "standard", 60.0, refuses=False)
    await ask(room, "long prompt", 6.0, refuses=False, priority=-10)
    await ask(room, "short prompt", 2.0, refuses=False, priority=-10)
    for _ in range(4):
        room.grant(MEASURED, free_sequences=1)
        await settled()
        room.grant(MEASURED, free_sequences=0)
        await room.leave()
    assert room.bound == ["short prompt", "long prompt", "standard", "batch"]


async def test_one_that_would_be_late_lets_those_pass_that_would_not(room: Room) -> None:
    room.grant(MEASURED, free_sequences=0)
    await ask(room, "late", 0.5, refuses=False)
    room.now = 0.45
    await ask(room, "in time", 1.0, refuses=False)
    await ask(room, "later", 3.0, refuses=False)
    room.grant(MEASURED, free_sequences=1)
    await settled()
    assert room.bound == ["in time"]
    room.grant(MEASURED, free_sequences=0)
    await room.leave()
    room.grant(MEASURED, free_sequences=1)
    await settled()
    assert room.bound == ["in time", "late"], "due again after four times its objective, and nobody passes it twice"


# What is known of a route -------------------------------------------------------------------------------------------
async def test_a_route_by_prediction_says_what_was_predicted_and_who_still_waits(room: Room) -> None:
    room.grant(MEASURED, free_sequences=0)
    await ask(room, "a", 2.0, refuses=False)
    await ask(room, "b", 3.0, refuses=False)
    room.grant(MEASURED, free_sequences=1)
    await settled()
    await room.leave()
    binding = await room.ended(0)
    assert binding.is_predicted
    assert binding.ttft_s == binding.read_s == pytest.approx(ALONE_S + 2 * 0.006), "six decode there"
    assert binding.behind == 1


async def test_a_route_by_pools_predicts_nothing(room: Room) -> None:
    room.grant(UNKNOWN)
    await ask(room, "a", 2.0, refuses=False)
    await room.leave()
    assert not (await room.ended()).is_predicted
