"""A decode that moves, and its workers, its client or its deadline fail on the way."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from splitserve.core.errors import DeadlineExceeded, SplitserveError
from splitserve.core.worker import Failure, Pool
from tests.unit.router.moving import DROPPED, Journeying, Phase, end_cancelled, ending, finish, moved, refusal
from tests.unit.router.scripted import WITHIN_S, Stage


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture
async def moving(stage: Stage) -> Journeying:
    moving = Journeying(stage)
    await moving.begin()
    return moving


# The copy fails -----------------------------------------------------------------------------------------------------
async def test_a_copy_whose_kv_does_not_arrive_costs_only_time(moving: Journeying) -> None:
    """A window may have moved on before its blocks were read: they go at the end."""
    moving.stage.move()
    moving.target.fail(await moving.target.decode_job(), Failure.TRANSFER)
    orders = [await moving.source.told_to_hand_over() for _ in range(2)]
    assert [order.at_end for order in orders] == [False, True]
    moving.source.hand_over(moving.job, 11, index=1)
    await finish(moving.stage, moving.call, moving.target, await moving.target.decode_job(), 2)


@pytest.mark.parametrize("failure", [Failure.NOT_NOW, Failure.ENGINE, Failure.CANCELLED, Failure.INVALID])
async def test_a_target_that_fails_the_copy_gets_no_more(moving: Journeying, failure: Failure) -> None:
    move = await moving.reach(Phase.COPY)
    moving.target.fail(moving.copy, failure)
    assert "d1: scripted" in await refusal(move)
    assert moving.source.idle, "it was not told to stop"
    await moving.finish_here()


@pytest.mark.parametrize("change", [{"draining": True}, {"free_sequences": 0}, {"parked_limit_blocks": 2}])
async def test_a_target_that_would_refuse_by_then_gets_no_more(moving: Journeying, change: dict[str, object]) -> None:
    move = await moving.reach(Phase.COPY)
    moving.target.report(**change)
    moving.target.finish(moving.copy, DROPPED)
    assert "worker d1 can't take over" in await refusal(move)
    assert moving.source.idle, "it was not told to stop"
    await moving.finish_here()


async def test_after_a_refusal_it_may_be_asked_again(moving: Journeying) -> None:
    move = await moving.reach(Phase.COPY)
    moving.target.fail(moving.copy, Failure.NOT_NOW)
    await refusal(move)
    moving.target.report()
    await moving.reach(Phase.ARRIVAL)
    await finish(moving.stage, moving.call, moving.target, moving.arrived, 2)


# The target dies ----------------------------------------------------------------------------------------------------
async def test_a_target_lost_during_the_copy_changes_nothing(moving: Journeying) -> None:
    move = await moving.reach(Phase.COPY)
    moving.target.die()
    assert "d1 is gone" in await refusal(move)
    assert moving.source.idle
    await moving.finish_here()


async def test_a_target_lost_after_the_stop_is_replaced(moving: Journeying) -> None:
    move = await moving.reach(Phase.STOP)
    moving.target.die()
    moving.source.hand_over(moving.job, 11, index=1)
    assert "failed" in await refusal(move)
    resumed = await moving.source.decode_job()
    assert (resumed.output, resumed.ticket) == ((10, 11), None)
    await finish(moving.stage, moving.call, moving.source, resumed, 2)


async def test_a_target_lost_before_its_first_token_is_replaced(moving: Journeying) -> None:
    move = await moving.reach(Phase.ARRIVAL)
    moving.target.die()
    assert "failed" in await refusal(move)
    resumed = await moving.source.decode_job()
    assert resumed.output == (10, 11)
    await finish(moving.stage, moving.call, moving.source, resumed, 2)


async def test_a_target_that_refuses_what_was_promised_is_asked_again_like_any_other(moving: Journeying) -> None:
    move = await moving.reach(Phase.ARRIVAL)
    moving.target.fail(moving.arrived, Failure.NOT_NOW)
    assert "failed" in await refusal(move)
    resumed = await moving.source.decode_job()
    assert resumed.output == (10, 11)
    await finish(moving.stage, moving.call, moving.source, resumed, 2)


async def test_a_target_that_gets_no_kv_is_left_however_busy_it_is(stage: Stage) -> None:
    moving = Journeying(stage)
    await moving.begin(inter_token_deadline_s=0.2)
    await moving.reach(Phase.ARRIVAL)
    resumed = None
    async with asyncio.timeout(WITHIN_S):
        while resumed is None:
            produced = moving.target.grants.produced_tokens + 1
            moving.target.report(produced_tokens=produced)  # for others
            await asyncio.sleep(0.01)
            resumed = None if moving.source.idle else await moving.source.decode_job()
    assert resumed.output == (10, 11)
    moving.target.obey()
    await finish(stage, moving.call, moving.source, resumed, 2)


# The source dies ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", [Phase.COPY, Phase.STOP])
async def test_a_source_lost_on_the_way_is_replaced(moving: Journeying, phase: Phase) -> None:
    move = await moving.reach(phase)
    moving.source.die()
    assert "d0 is gone" in await refusal(move)
    if phase is Phase.COPY:
        await moving.target.cancelled_job(moving.copy)
        moving.target.obey()
    resumed = await moving.target.decode_job()
    assert (resumed.output, resumed.ticket) == ((10,), None)
    await finish(moving.stage, moving.call, moving.target, resumed, 1)


async def test_kv_that_is_lost_with_its_source_is_not_the_targets_fault(moving: Journeying) -> None:
    moving.stage.worker("d2", Pool.DECODE).report(free_sequences=1)
    move = await moving.reach(Phase.ARRIVAL)
    moving.source.report(free_sequences=8)
    moving.target.fail(moving.arrived, Failure.TRANSFER)
    assert "failed" in await refusal(move)
    resumed = await moving.target.decode_job()
    assert resumed.output == (10, 11)
    await finish(moving.stage, moving.call, moving.target, resumed, 2)


# The request ends ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", [Phase.COPY, Phase.STOP])
async def test_a_request_that_ends_first_does_not_move(moving: Journeying, phase: Phase) -> None:
    move = await moving.reach(phase)
    await moving.finish_here()
    assert "ended before it had moved" in await refusal(move)
    if phase is Phase.COPY:
        assert moving.copy.job_id in moving.target.cancelled


async def test_a_request_whose_first_token_elsewhere_is_its_last_has_moved(stage: Stage) -> None:
    moving = Journeying(stage)
    await moving.begin(max_tokens=3)
    move = await moving.reach(Phase.ARRIVAL)
    moving.target.finish(moving.arrived, 12, index=2)
    await ending(moving.call)
    assert stage.token_ids == [10, 11, 12]
    assert (await moved(move)).to_worker == "d1"


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("how", ["hangs up", "deadline"])
async def test_whatever_ends_a_request_leaves_nothing_behind(stage: Stage, phase: Phase, how: str) -> None:
    moving = Journeying(stage)
    await moving.begin(deadline_s=0.5 if how == "deadline" else None)
    move = await moving.reach(phase)
    if how == "hangs up":
        moving.call.cancel()
    await asyncio.wait({moving.call}, timeout=WITHIN_S)
    assert moving.call.cancelled() if how == "hangs up" else isinstance(moving.call.exception(), DeadlineExceeded)
    assert await refusal(move)
    expected = {
        Phase.COPY: (moving.source, moving.job.job_id),
        Phase.STOP: (moving.source, moving.job.job_id),
        Phase.ARRIVAL: (moving.target, getattr(moving, "arrived", moving.job).job_id),
    }
    worker, job_id = expected[phase]
    await worker.cancelled_job(replace(moving.job, job_id=job_id))
    if phase is Phase.COPY:
        await moving.target.cancelled_job(moving.copy)
    end_cancelled(stage)
    assert stage.promised() == 0


async def test_an_engine_that_breaks_under_the_order_is_left(moving: Journeying) -> None:
    move = await moving.reach(Phase.STOP)
    moving.source.fail(moving.job, Failure.ENGINE)
    assert "tried elsewhere" in await refusal(move)
    await finish(moving.stage, moving.call, moving.target, await moving.target.decode_job(), 1)


async def test_a_fault_of_the_request_ends_it_and_the_order(moving: Journeying) -> None:
    move = await moving.reach(Phase.STOP)
    moving.source.fail(moving.job, Failure.INVALID, field="sampling.stop")
    with pytest.raises(SplitserveError):
        await ending(moving.call)
    assert await refusal(move)
    end_cancelled(moving.stage)
    assert moving.stage.promised() == 0
