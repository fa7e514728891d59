"""Requests that wait for a route, and what is held for them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from random import Random

import pytest

from splitserve.core.errors import Limit, Overloaded, Unavailable
from splitserve.core.worker import Pool
from splitserve.routing.candidate import Candidate
from splitserve.routing.route import Need
from tests.unit.router.room import Room, settled
from tests.unit.router.scripted import worker_info

DECODE = worker_info("d0", Pool.DECODE)
SPARE = worker_info("d1", Pool.DECODE)


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    async with Room.open() as room:
        room.grant(DECODE, free_sequences=0)
        yield room


async def test_requests_go_by_priority_and_then_by_arrival(room: Room) -> None:
    await room.ask("late", arrived_at=3.0)
    await room.ask("early", arrived_at=1.0)
    await room.ask("urgent", priority=-1, arrived_at=9.0)
    await room.ask("patient", priority=1, arrived_at=0.0)
    room.grant(DECODE, free_sequences=8)
    await settled()
    assert room.bound == ["urgent", "early", "late", "patient"]


async def test_what_can_not_go_holds_up_what_is_behind_it(room: Room) -> None:
    await room.ask("long", arrived_at=1.0, need=Need(200))
    await room.ask("short", arrived_at=2.0, need=Need(20))
    room.grant(DECODE, free_blocks=5)
    await settled()
    assert room.bound == []
    room.grant(DECODE)
    await settled()
    assert room.bound == ["long", "short"]


async def test_a_request_that_must_avoid_a_worker_holds_up_nobody(room: Room) -> None:
    room.grant(SPARE, free_sequences=0)
    await room.ask("picky", arrived_at=1.0, need=Need(40, avoid=frozenset({DECODE.uuid})))
    await room.ask("other", arrived_at=2.0)
    room.grant(DECODE, free_sequences=1)
    await settled()
    assert room.bound == ["other"]
    room.grant(SPARE, free_sequences=1)
    await settled()
    assert room.bound == ["other", "picky"]


async def test_requests_that_avoid_the_same_worker_wait_in_one_line(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost worker leaves hundreds of them: a look at the fleet for each, at each change, would stop the router."""
    looks = 0
    sample = room.fleet.sample

    def counted(now: float, random: Random, beside: str) -> Sequence[Candidate]:
        nonlocal looks
        looks += 1
        return sample(now, random, beside)

    room.grant(SPARE, free_sequences=0)
    need = Need(40, avoid=frozenset({DECODE.uuid}))
    for number in range(50):
        await room.ask(f"{number}", arrived_at=float(number), need=replace(need, tokens=40 + number))
    monkeypatch.setattr(room.fleet, "sample", counted)
    room.waiting.pump()
    assert looks == 1
    room.grant(SPARE, free_sequences=3)
    await settled()
    assert room.bound == ["0", "1", "2"]


async def test_of_lines_that_avoid_different_workers_the_most_urgent_goes_first(room: Room) -> None:
    room.grant(SPARE, free_sequences=0)
    await room.ask("late", arrived_at=2.0, need=Need(40, avoid=frozenset({DECODE.uuid})))
    await room.ask("early", arrived_at=1.0, need=Need(40, avoid=frozenset({DECODE.uuid, "gone"})))
    await room.ask("last", arrived_at=3.0, need=Need(40, avoid=frozenset({DECODE.uuid, "gone"})))
    room.grant(SPARE, free_sequences=2)
    await settled()
    assert room.bound == ["early", "late"]


async def test_a_bound_route_counts_against_the_next_request(room: Room) -> None:
    await room.ask("a", arrived_at=1.0)
    await room.ask("b", arrived_at=2.0)
    room.grant(DECODE, free_sequences=1)
    await settled()
    assert room.bound == ["a"]


@pytest.mark.parametrize("how", ["leaves", "is cancelled"])
async def test_a_promise_whose_job_was_never_sent_goes_to_the_next(room: Room, how: str) -> None:
    await room.ask("a", arrived_at=1.0)
    await room.ask("b", arrived_at=2.0)
    room.grant(DECODE, free_sequences=1)
    await settled()
    if how == "leaves":
        await room.leave()
    else:
        room.tasks[0].cancel()
    await settled()
    assert room.bound == ["a", "b"]


@pytest.mark.parametrize("how", ["is left", "is sent"])
async def test_a_moves_target_is_promised_until_it_is_left_or_its_job_is_sent(room: Room, how: str) -> None:
    room.grant(SPARE, free_sequences=1)
    with room.waiting.target(DECODE, 40, "r/move-1", None) as binding:
        assert binding is not None
        assert (binding.decode, binding.prefill, binding.computes_prompt) == (SPARE, None, True)
        assert room.fleet.holds(SPARE.uuid, binding.decode_job_id)
        with room.waiting.target(DECODE, 40, "r/move-2", None) as second:
            assert second is None, "its only sequence is promised"
        if how == "is sent":
            room.fleet.sent(SPARE.uuid, binding.decode_job_id)
    assert room.fleet.holds(SPARE.uuid, binding.decode_job_id) is (how == "is sent")


async def test_a_moves_target_may_leave_while_it_is_promised(room: Room) -> None:
    room.grant(SPARE)
    with room.waiting.target(DECODE, 40, "r/move-1", SPARE.uuid) as binding:
        assert binding is not None
        room.fleet.leave(SPARE.uuid)
    with room.waiting.target(DECODE, 40, "r/move-2", SPARE.uuid) as binding:
        assert binding is None


async def test_a_waiting_request_that_is_cancelled_is_forgotten(room: Room) -> None:
    await room.ask("a")
    room.tasks[0].cancel()
    await settled()
    assert len(room.waiting) == 0
    room.grant(DECODE)
    await settled()
    assert room.bound == []


async def test_when_the_last_worker_leaves_everyone_who_waits_hears_it(room: Room) -> None:
    await room.ask("a")
    await room.ask("b")
    room.fleet.leave(DECODE.uuid)
    room.waiting.pump()
    for place in (0, 1):
        with pytest.raises(Unavailable, match="no worker has joined"):
            await room.ended(place)


async def test_a_request_that_failed_before_hears_how_if_no_worker_is_left(room: Room) -> None:
    await room.ask("a", failed_with=Unavailable("d0 is gone"))
    room.fleet.leave(DECODE.uuid)
    room.waiting.pump()
    with pytest.raises(Unavailable, match="d0 is gone"):
        await room.ended()


async def test_a_full_queue_refuses_new_requests_but_not_those_that_were_served_before() -> None:
    room = Room(limit=1)
    room.grant(DECODE, free_sequences=0)
    await room.ask("a")
    await room.ask("b")
    with pytest.raises(Overloaded, match="1 requests are waiting") as raised:
        await room.ended()
    assert raised.value.retry_after_s >= 0.5
    assert raised.value.limit is Limit.QUEUE
    await room.ask("c", failed_with=Unavailable("d1 is gone"))
    assert len(room.waiting) == 2
    room.grant(DECODE)
    await settled()
    assert room.bound == ["a", "c"]
    await room.leave()
    await asyncio.gather(*room.tasks, return_exceptions=True)


@pytest.mark.parametrize(("gap_s", "pause_s"), [(0.1, 1.0), (5.0, 30.0)])
async def test_a_slower_queue_asks_for_a_longer_pause(gap_s: float, pause_s: float) -> None:
    """Half of the 20 that wait will have gone then, 30 s at most."""
    async with Room.open(limit=20) as room:
        await room.moves_on(DECODE, gap_s, requests=200)
        for place in range(21):
            await room.ask(f"waits-{place}")
        with pytest.raises(Overloaded) as raised:
            await room.ended()
    assert raised.value.retry_after_s == pytest.approx(pause_s)


async def test_only_what_waited_tells_how_fast_the_queue_moves() -> None:
    async with Room.open() as room:
        await room.moves_on(DECODE, 0.1, requests=200)
        room.grant(DECODE)
        for place in range(8):  # they go on while the next one comes
            room.now += 100.0
            await room.ask(f"alone-{place}")
            await settled()
        assert room.waiting.pace_s == pytest.approx(0.1)


async def test_who_gives_up_waiting_does_not_slow_the_queue() -> None:
    async with Room.open() as room:
        await room.moves_on(DECODE, 0.1, requests=200)
        await room.ask("bound")
        await room.ask("gives up")
        room.grant(DECODE, free_sequences=1)
        await settled()
        room.tasks[-1].cancel()
        await settled()
        room.now += 1000.0
        room.grant(DECODE, free_sequences=8)
        await room.ask("next")
        await settled()
        assert room.bound[-1] == "next"
        assert room.waiting.pace_s == pytest.approx(0.1)
