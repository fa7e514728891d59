"""When a decode moves while its stream goes on, what goes where, and when it stays."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from splitserve.core.request import Usage
from splitserve.core.worker import KvMode, Pool
from tests.unit.router.moving import COPIED, DROPPED, PROMPT, Journeying, Phase, ending, finish, moved, refusal
from tests.unit.router.scripted import Stage


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


# It moves -----------------------------------------------------------------------------------------------------------
async def test_a_moved_decode_loses_no_token_and_repeats_none(moving: Journeying) -> None:
    move = await moving.reach(Phase.ARRIVAL)
    assert moving.arrived.output == (10, 11)
    last = await finish(moving.stage, moving.call, moving.target, moving.arrived, 2)
    assert last.usage == Usage(40, 4)
    assert last.timings is not None
    assert (last.timings.decode_worker, last.timings.attempts) == ("d1", 1), "a move is no second attempt"
    done = await moved(move)
    assert (done.from_worker, done.to_worker) == ("d0", "d1")
    assert done.stall_s >= 0


async def test_full_blocks_go_ahead_while_the_decode_goes_on_and_the_rest_at_its_end(moving: Journeying) -> None:
    moving.stage.move()
    copy, ahead = await moving.target.decode_job(), await moving.source.told_to_hand_over()
    assert copy.prompt == PROMPT[: COPIED + 1], "the token after the last full block is there to be computed"
    assert copy.ticket == ahead.ticket
    assert (ahead.job_id, ahead.at_end) == (moving.job.job_id, False)
    moving.source.say(moving.job, 11, index=1)
    await moving.stage.seen(2)
    moving.target.finish(copy, DROPPED)
    rest = await moving.source.told_to_hand_over()
    assert (rest.job_id, rest.at_end) == (moving.job.job_id, True)
    moving.source.hand_over(moving.job, 12, index=2)
    arrived = await moving.target.decode_job()
    assert (arrived.prompt, arrived.output, arrived.ticket) == (PROMPT, (10, 11, 12), rest.ticket)
    assert rest.ticket != ahead.ticket
    assert rest.ticket.source == moving.source.info.kv_peers
    assert rest.ticket.destination == moving.target.info.kv_peers
    await finish(moving.stage, moving.call, moving.target, arrived, 3)


async def test_a_stop_that_comes_with_no_token_of_its_own_is_as_good(moving: Journeying) -> None:
    await moving.reach(Phase.STOP)
    moving.source.hand_over(moving.job)
    arrived = await moving.target.decode_job()
    assert arrived.output == (10,)
    await finish(moving.stage, moving.call, moving.target, arrived, 1)


@pytest.mark.parametrize(("prompt", "copied"), [(15, 0), (16, 16), (17, 16), (31, 16), (32, 32)])
async def test_only_blocks_that_no_token_will_change_go_ahead(stage: Stage, prompt: int, copied: int) -> None:
    """With its first token a prompt of n tokens has the KV of n of them to move; without a full block it stops at
    once."""
    moving = Journeying(stage)
    await moving.begin(prompt=PROMPT[:prompt])
    stage.move()
    first = await moving.source.told_to_hand_over()
    assert first.at_end is (copied == 0)
    if copied:
        copy = await moving.target.decode_job()
        assert len(copy.prompt) == copied + 1
        moving.target.finish(copy, DROPPED)
        await moving.source.told_to_hand_over()
    moving.source.hand_over(moving.job, 11, index=1)
    await finish(stage, moving.call, moving.target, await moving.target.decode_job(), 2)


async def test_without_room_for_the_copy_beside_what_is_promised_it_all_goes_at_the_end(moving: Journeying) -> None:
    moving.target.report(parked_limit_blocks=3)
    moving.stage.move()
    assert (await moving.source.told_to_hand_over()).at_end
    assert moving.target.idle
    moving.source.hand_over(moving.job, 11, index=1)
    await finish(moving.stage, moving.call, moving.target, await moving.target.decode_job(), 2)


async def test_a_decode_may_move_again_and_back(moving: Journeying) -> None:
    await moving.reach(Phase.ARRIVAL)
    moving.target.say(moving.arrived, 12, index=2)
    await moving.stage.seen(3)
    back = moving.stage.move(moving.source)
    copy = await moving.source.decode_job()
    assert copy.prompt == (*PROMPT, 10, 11, 12)[: COPIED + 1]
    moving.source.finish(copy, DROPPED)
    orders = [await moving.target.told_to_hand_over() for _ in range(2)]
    moving.target.hand_over(moving.arrived)
    again = await moving.source.decode_job()
    assert len({moving.job.job_id, moving.copy.job_id, moving.arrived.job_id, copy.job_id, again.job_id}) == 5
    used = {job.ticket for job in (moving.copy, moving.arrived, copy, again)}
    assert len(used) == 4, "a ticket is used once"
    assert {order.ticket for order in orders} == {copy.ticket, again.ticket}
    last = await finish(moving.stage, moving.call, moving.source, again, 3)
    assert (await moved(back)).to_worker == "d0"
    assert last.timings is not None
    assert last.timings.attempts == 1


async def test_names_do_not_grow_with_every_move(stage: Stage) -> None:
    """They go along with each token."""
    moving = Journeying(stage)
    await moving.begin(max_tokens=20)
    here, there, job = moving.source, moving.target, moving.job
    lengths = []
    for index in range(1, 7):
        stage.move()
        there.finish(await there.decode_job(), DROPPED)
        here.hand_over(job)
        here, there, job = there, here, await there.decode_job()
        here.say(job, 10 + index, index=index)
        lengths.append(len(job.job_id))
    assert len(set(lengths)) == 1
    here.finish(job, 17, index=7)
    await ending(moving.call)
    assert stage.token_ids == list(range(10, 18))


async def test_a_decode_that_was_resumed_moves_with_all_that_its_client_has(stage: Stage) -> None:
    moving = Journeying(stage)
    lost, moving.source = moving.source, moving.target
    call = stage.request(prompt=PROMPT)
    lost.say(await lost.decode_job(), 10, 11)
    lost.die()
    resumed = await moving.source.decode_job()
    moving.source.say(resumed, 12, index=2)
    await stage.seen(3)
    third = stage.worker("d2", Pool.DECODE)
    stage.move()
    copy = await third.decode_job()
    assert copy.prompt == (*PROMPT, 10, 11, 12)[: COPIED + 1]
    third.finish(copy, DROPPED)
    moving.source.hand_over(resumed)
    last = await finish(stage, call, third, await third.decode_job(), 3)
    assert last.timings is not None
    assert last.timings.attempts == 2


async def test_the_next_worker_gets_what_the_sampler_state_follows_from(stage: Stage) -> None:
    moving = Journeying(stage)
    moving.target.die()
    moving.target = stage.worker("d2", Pool.DECODE, restores=("presence_penalty", "seed"))
    await moving.begin(presence_penalty=0.5)
    await moving.reach(Phase.ARRIVAL)
    assert (moving.arrived.sampling, moving.arrived.output) == (moving.job.sampling, (10, 11))
    await finish(stage, moving.call, moving.target, moving.arrived, 2)


# It stays -----------------------------------------------------------------------------------------------------------
async def test_a_request_that_has_made_no_token_stays(stage: Stage) -> None:
    moving = Journeying(stage)
    call = stage.request(prompt=PROMPT)
    job = await moving.source.decode_job()
    assert "not begun to decode" in await refusal(stage.move())
    await finish(stage, call, moving.source, job, 0)


async def test_a_request_that_waits_for_a_route_stays(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    decode.report(free_sequences=0)
    call = stage.request()
    await asyncio.sleep(0)
    assert "waits for a route" in await refusal(stage.move())
    decode.report(free_sequences=1)
    await finish(stage, call, decode, await decode.decode_job(), 0)


@pytest.mark.parametrize("full", [{"free_sequences": 0}, {"parked_limit_blocks": 2}, {"draining": True}])
async def test_without_room_elsewhere_it_stays(moving: Journeying, full: dict[str, object]) -> None:
    moving.target.report(**full)
    assert "no other worker can take over 41 tokens" in await refusal(moving.stage.move())
    assert "worker d1 can't take over 41 tokens" in await refusal(moving.stage.move(moving.target))
    assert moving.source.idle
    await moving.finish_here()


async def test_where_it_is_already_it_stays(moving: Journeying) -> None:
    assert "on worker d0 already" in await refusal(moving.stage.move(moving.source))
    await moving.finish_here()


async def test_pulled_kv_does_not_move(stage: Stage) -> None:
    source = stage.worker("d0", Pool.DECODE, KvMode.PULL)
    stage.worker("d1", Pool.DECODE, KvMode.PULL)
    call = stage.request(prompt=PROMPT)
    job = await source.decode_job()
    source.say(job, 10)
    await stage.seen(1)
    assert "kv_transfer.mode is pull" in await refusal(stage.move())
    await finish(stage, call, source, job, 1)


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "seed"])
async def test_a_sampler_state_that_the_target_can_not_take_up_keeps_it(stage: Stage, field: str) -> None:
    moving = Journeying(stage)
    await moving.begin(temperature=1.0, **{field: 1})
    assert f"sampling.{field}" in await refusal(stage.move())
    assert moving.target.idle
    await moving.finish_here()


@pytest.mark.parametrize("phase", [Phase.COPY, Phase.STOP])
async def test_a_second_order_is_refused_and_the_first_is_carried_out(moving: Journeying, phase: Phase) -> None:
    first = await moving.reach(phase)
    assert "on its way" in await refusal(moving.stage.move())
    if phase is Phase.COPY:
        moving.target.finish(moving.copy, DROPPED)
        await moving.source.told_to_hand_over()
    moving.source.hand_over(moving.job, 11, index=1)
    await finish(moving.stage, moving.call, moving.target, await moving.target.decode_job(), 2)
    assert (await moved(first)).to_worker == "d1"


async def test_an_order_beside_the_stop_itself_is_answered(moving: Journeying) -> None:
    """The journey takes both at once, and ends its attempt at the first."""
    await moving.reach(Phase.STOP)
    moving.source.hand_over(moving.job, 11, index=1)
    late = moving.stage.move()
    assert "on its way" in await refusal(late)
    await finish(moving.stage, moving.call, moving.target, await moving.target.decode_job(), 2)


async def test_an_order_beside_the_loss_of_its_worker_is_answered(moving: Journeying) -> None:
    moving.source.die()
    assert "d0 is gone" in await refusal(moving.stage.move())
    await finish(moving.stage, moving.call, moving.target, await moving.target.decode_job(), 1)


async def test_an_order_beside_the_last_token_is_answered(moving: Journeying) -> None:
    moving.source.finish(moving.job, 11, 12, 13, index=1)
    late = moving.stage.move()
    assert "has ended" in await refusal(late)
    await ending(moving.call)
    assert moving.target.idle
