"""Requests that wait for a route, and what is held for them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from random import Random

import pytest

from splitserve.core.errors import Overloaded, Unavailable
from splitserve.core.worker import Load, Pool, WorkerInfo
from splitserve.router.waiting import Ask, Binding, WaitingRequests
from splitserve.routing.fleet import Candidate, Fleet
from splitserve.routing.route import Need
from tests.unit.router.scripted import WITHIN_S, load_of, worker_info

DECODE = worker_info("d0", Pool.DECODE)
SPARE = worker_info("d1", Pool.DECODE)


class Room:
    """A fleet whose workers grant what a test says, and who got in, in order."""

    def __init__(self, limit: int = 100) -> None:
        self.now = 0.0
        self.fleet = Fleet(silent_after_s=60.0)
        self.waiting = WaitingRequests(self.fleet, limit, lambda: self.now)
        self.bound: list[str] = []
        self.tasks: list[asyncio.Task[Binding]] = []
        self._leave = asyncio.Event()

    def grant(self, info: WorkerInfo, **changes: object) -> None:
        if info.uuid not in self.fleet:
            self.fleet.join(info, self.now)
        load: Load = load_of(info, **changes)
        self.fleet.report(info.uuid, load, self.now)
        self.waiting.pump()

    async def ask(self, name: str, priority: int = 0, arrived_at: float = 0.0, **others: object) -> None:
        ask = Ask(Need(40), name, priority, arrived_at)
        self.tasks.append(asyncio.create_task(self._hold(replace(ask, **others))))  # type: ignore[arg-type]
        await asyncio.sleep(0)

    async def ended(self, place: int = -1) -> Binding:
        async with asyncio.timeout(WITHIN_S):
            return await self.tasks[place]

    async def leave(self) -> None:
        """Everybody who is bound goes."""
        self._leave.set()
        await asyncio.sleep(0)

    async def _hold(self, ask: Ask) -> Binding:
        async with self.waiting.bound(ask) as binding:
            self.bound.append(ask.job_prefix)
            await self._leave.wait()
            return binding


@pytest.fixture
async def room() -> AsyncIterator[Room]:
    room = Room()
    room.grant(DECODE, free_sequences=0)
    yield room
    for task in room.tasks:
        task.cancel()
    await asyncio.gather(*room.tasks, return_exceptions=True)


async def settled() -> None:
    """Lets every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


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
    await room.ask("c", failed_with=Unavailable("d1 is gone"))
    assert len(room.waiting) == 2
    room.grant(DECODE)
    await settled()
    assert room.bound == ["a", "c"]
    await room.leave()
    await asyncio.gather(*room.tasks, return_exceptions=True)


async def test_a_slower_queue_asks_for_a_longer_pause() -> None:
    pauses = []
    for gap_s in (0.1, 5.0):
        room = Room(limit=20)
        room.grant(DECODE)
        for place in range(40):
            room.now += gap_s
            await room.ask(f"served-{place}")
            room.tasks[-1].cancel()
            await settled()
        room.grant(DECODE, free_sequences=0)
        for place in range(21):
            await room.ask(f"waits-{place}")
        with pytest.raises(Overloaded) as raised:
            await room.ended()
        pauses.append(raised.value.retry_after_s)
        for task in room.tasks:
            task.cancel()
        await asyncio.gather(*room.tasks, return_exceptions=True)
    assert pauses[0] < pauses[1] <= 30.0
