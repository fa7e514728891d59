"""Who is asked to leave a worker that drains, when, and how often."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry

from splitserve.core.fleet import Explanation, RunningRequest
from splitserve.router import evacuation
from splitserve.router.evacuation import AT_ONCE, Evacuation
from splitserve.router.move import Move, Moved
from splitserve.router.running import Running
from splitserve.telemetry.metrics import RouterMetrics
from tests.unit.router.scripted import WITHIN_S

MOVED = Moved("d0", "d1", stall_s=0.25)


class Passenger:
    """A request that decodes on d0. `answer` is what becomes of each order, at once; without, a test says it."""

    def __init__(self, answer: Callable[[Move], None] | None = None) -> None:
        self.decode_worker = "d0"
        self.orders: list[Move] = []
        self._answer = answer

    def move(self, move: Move) -> None:
        self.orders.append(move)
        if self._answer is not None:
            self._answer(move)

    def explain(self) -> Explanation:
        raise AssertionError("an evacuation has no use for it")

    def status(self) -> RunningRequest:
        raise AssertionError("an evacuation has no use for it")


class Ferry:
    """An evacuation that runs, and who runs in its router."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.draining = {"d0"}
        self.running = Running()
        self._admitted: dict[str, ExitStack] = {}
        evacuation = Evacuation(self.running, lambda: self.draining, RouterMetrics(self.registry))
        self._task = asyncio.create_task(evacuation.run())

    def board(self, name: str, passenger: Passenger) -> Passenger:
        stack = self._admitted[name] = ExitStack()
        stack.enter_context(self.running.admitted(name))
        self.running.travels(name, 0, passenger)
        return passenger

    def leave(self, name: str) -> None:
        self._admitted.pop(name).close()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not holds():  # noqa: ASYNC110 - it looks around by the clock, and so must who watches it
                await asyncio.sleep(evacuation.LOOK_S)

    async def looks(self, times: int = 5) -> None:
        """Lets it look around so often."""
        for _ in range(times):
            await asyncio.sleep(evacuation.LOOK_S)

    def count(self, outcome: str) -> float | None:
        return self.registry.get_sample_value("splitserve_migrations_total", {"outcome": outcome})

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=WITHIN_S)


@pytest.fixture
async def ferry(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ferry]:
    monkeypatch.setattr(evacuation, "LOOK_S", 0.001)
    monkeypatch.setattr(evacuation, "AGAIN_S", 0.0)
    ferry = Ferry()
    yield ferry
    await ferry.close()


async def test_only_a_few_move_at_a_time_and_then_the_others(ferry: Ferry) -> None:
    passengers = [ferry.board(f"r{number}", Passenger()) for number in range(AT_ONCE + 2)]
    await ferry.until(lambda: sum(len(each.orders) for each in passengers) == AT_ONCE)
    await ferry.looks()
    asked = [each for each in passengers if each.orders]
    assert len(asked) == AT_ONCE
    for each in asked:
        each.decode_worker = "d1"
        each.orders[0].done(MOVED)
    await ferry.until(lambda: all(each.orders for each in passengers))
    assert ferry.count("moved") == AT_ONCE
    assert ferry.registry.get_sample_value("splitserve_migration_stall_seconds_sum") == 0.25 * AT_ONCE


async def test_a_request_that_could_not_move_is_asked_again_until_it_can(ferry: Ferry) -> None:
    passenger = ferry.board("r", Passenger())
    for times in (1, 2, 3):
        await ferry.until(lambda times=times: len(passenger.orders) == times)  # type: ignore[misc]
        passenger.orders[-1].refuse("no room")
    await ferry.until(lambda: len(passenger.orders) == 4)
    passenger.decode_worker = "d1"
    passenger.orders[-1].done(MOVED)
    await ferry.until(lambda: ferry.count("moved") == 1)
    assert ferry.count("refused") == 1, "the same reason counts once"
    assert len(passenger.orders) == 4


async def test_another_reason_counts_again(ferry: Ferry) -> None:
    passenger = ferry.board("r", Passenger())
    for times, reason in enumerate(("not begun", "no room", "no room"), start=1):
        await ferry.until(lambda times=times: len(passenger.orders) == times)  # type: ignore[misc]
        passenger.orders[-1].refuse(reason)
    await ferry.until(lambda: len(passenger.orders) == 4)
    assert ferry.count("refused") == 2


async def test_those_that_can_not_move_do_not_hold_up_those_that_can(ferry: Ferry) -> None:
    """Although they are due again at once."""
    for number in range(3 * AT_ONCE):
        ferry.board(f"stays-{number}", Passenger(lambda move: move.refuse("it must stay")))
    last = ferry.board("goes", Passenger())
    await ferry.until(lambda: len(last.orders) == 1)


async def test_a_move_that_goes_on_for_ever_does_not_hold_up_the_others(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evacuation, "WITHIN_S", 0.01)
    for number in range(AT_ONCE):
        ferry.board(f"stuck-{number}", Passenger())
    last = ferry.board("goes", Passenger())
    await ferry.until(lambda: len(last.orders) == 1)


async def test_nobody_is_asked_to_leave_a_worker_that_does_not_drain(ferry: Ferry) -> None:
    ferry.draining.clear()
    passenger, other = ferry.board("r", Passenger()), ferry.board("other", Passenger())
    other.decode_worker = "d1"
    await ferry.looks()
    assert not passenger.orders
    ferry.draining.add("d0")
    await ferry.until(lambda: len(passenger.orders) == 1)
    assert not other.orders


async def test_a_request_under_way_is_not_asked_twice(ferry: Ferry) -> None:
    passenger = ferry.board("r", Passenger())
    await ferry.until(lambda: len(passenger.orders) == 1)
    await ferry.looks()
    assert len(passenger.orders) == 1


async def test_a_request_id_used_again_is_not_taken_for_the_one_before(ferry: Ferry) -> None:
    first = ferry.board("r", Passenger())
    await ferry.until(lambda: len(first.orders) == 1)
    first.orders[0].refuse("it ended before it had moved")
    ferry.leave("r")
    await ferry.looks()
    again = ferry.board("r", Passenger(lambda move: move.refuse("it ended before it had moved")))
    await ferry.until(lambda: ferry.count("refused") == 2)
    assert again.orders
