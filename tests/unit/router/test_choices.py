"""Several outputs of one prompt: one transfer, a life each, one stream."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from splitserve.core.errors import SplitserveError, Unavailable
from splitserve.core.request import Chunk, FinishReason, Usage
from splitserve.core.worker import DecodeJob, Failure, Pool
from tests.unit.router.scripted import WITHIN_S, ScriptedWorker, Stage


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


async def ending(call: "asyncio.Task[Chunk]") -> Chunk:
    async with asyncio.timeout(WITHIN_S):
        return await call


async def jobs_of(decode: ScriptedWorker, count: int) -> list[DecodeJob]:
    """In the order of their choices: their seeds tell."""
    jobs = [await decode.decode_job() for _ in range(count)]
    return sorted(jobs, key=lambda job: job.sampling.seed or 0)


async def begun(stage: Stage, n: int = 3) -> "tuple[asyncio.Task[Chunk], list[DecodeJob]]":
    """A request of n outputs, each of which has a job on d0; the first has made a token."""
    prefill, decode = stage.pair()
    call = stage.request(n=n, seed=7, temperature=1.0)
    first = await decode.decode_job()
    prefill.sent_kv(await prefill.prefill_job())
    decode.say(first, 10)
    return call, [first, *await jobs_of(decode, n - 1)]


async def test_the_others_set_out_when_the_first_has_a_token_to_where_its_kv_is(stage: Stage) -> None:
    prefill, decode = stage.pair()
    stage.request(n=3)
    first = await decode.decode_job()
    await prefill.prefill_job()
    await asyncio.sleep(0)
    assert (stage.set_out, decode.idle) == ([0], True)
    decode.say(first, 10)
    others = [await decode.decode_job() for _ in range(2)]
    assert first.ticket is not None
    assert [job.ticket for job in others] == [None, None]
    assert (stage.set_out, prefill.idle) == ([0, 1, 2], True)


async def test_each_output_has_its_own_seed_and_stands_alone_as_a_job(stage: Stage) -> None:
    _, jobs = await begun(stage)
    assert [job.sampling.seed for job in jobs] == [7, 8, 9]
    assert {job.sampling.n for job in jobs} == {1}
    assert len({job.job_id for job in jobs}) == 3


async def test_one_stream_has_them_all_and_its_end_their_sum(stage: Stage) -> None:
    call, (first, second, third) = await begun(stage)
    decode = stage.workers[1]
    decode.finish(second, 20, 21, 22, 23)
    decode.finish(first, 11, index=1, stop=True)
    decode.finish(third, 30, 31, 32, 33)
    last = await ending(call)
    assert [stage.tokens_of(choice) for choice in range(3)] == [[10, 11], [20, 21, 22, 23], [30, 31, 32, 33]]
    ends = {chunk.choice: chunk for chunk in stage.chunks if chunk.finish_reason is not None}
    assert {choice: chunk.finish_reason for choice, chunk in ends.items()} == {
        0: FinishReason.STOP,
        1: FinishReason.LENGTH,
        2: FinishReason.LENGTH,
    }
    assert [chunk for chunk in stage.chunks if chunk.usage is not None or chunk.timings is not None] == [last]
    assert last.usage == Usage(4, 10)
    assert last.timings is not None
    assert last.timings.prefill_worker == "p0"


async def test_a_first_output_of_one_chunk_lets_the_others_go_too(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request(n=2, max_tokens=1)
    decode.finish(await decode.decode_job(), 10)
    decode.finish(await decode.decode_job(), 20)
    assert (await ending(call)).usage == Usage(4, 2)


async def test_an_output_whose_worker_is_lost_is_resumed_and_the_others_with_it(stage: Stage) -> None:
    call, (first, second) = await begun(stage, n=2)
    stage.workers[1].say(second, 20)
    await stage.seen(2)
    spare = stage.worker("d1", Pool.DECODE)
    stage.workers[1].die()
    jobs = {job.output: job for job in [await spare.decode_job() for _ in range(2)]}
    assert set(jobs) == {(10,), (20,)}
    spare.finish(jobs[(20,)], 21, index=1, stop=True)
    spare.finish(jobs[(10,)], 11, index=1, stop=True)
    await ending(call)
    assert [stage.tokens_of(choice) for choice in range(2)] == [[10, 11], [20, 21]]
    assert first.request_id == second.request_id


async def test_an_output_that_its_worker_can_not_take_now_goes_elsewhere(stage: Stage) -> None:
    prefill, decode = stage.pair()
    other = stage.worker("d1", Pool.DECODE)
    stage.request(n=2)
    first = await decode.decode_job()
    await prefill.prefill_job()
    decode.report(free_sequences=0)
    decode.say(first, 10)
    assert (await other.decode_job()).ticket is not None


async def test_an_output_that_a_full_worker_gave_back_still_goes_where_its_prompt_is_cached(stage: Stage) -> None:
    _, jobs = await begun(stage, n=2)
    stage.worker("d1", Pool.DECODE)
    decode = stage.workers[1]
    decode.fail(jobs[1], Failure.NOT_NOW)
    decode.report()
    again = await decode.decode_job()
    assert (again.ticket, again.sampling.seed) == (None, 8)


async def test_if_one_output_can_not_be_served_no_other_goes_on(stage: Stage) -> None:
    call, jobs = await begun(stage)
    decode = stage.workers[1]
    decode.fail(jobs[2], Failure.INVALID, "sampling")
    with pytest.raises(SplitserveError):
        await ending(call)
    for job in jobs[:2]:
        await decode.cancelled_job(job)


async def test_a_client_that_hangs_up_takes_all_outputs_along(stage: Stage) -> None:
    call, jobs = await begun(stage)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending(call)
    for job in jobs:
        await stage.workers[1].cancelled_job(job)
    stage.workers[1].obey()
    assert stage.promised() == 0


async def test_without_a_worker_all_outputs_fail_with_the_one_reason(stage: Stage) -> None:
    with pytest.raises(Unavailable, match="no worker"):
        await ending(stage.request(n=2))


async def test_the_prompt_is_charged_once_and_each_output_by_itself(stage: Stage) -> None:
    call, (first, second) = await begun(stage, n=2)
    stage.workers[1].finish(first, 11, index=1, stop=True)
    stage.workers[1].finish(second, 20, stop=True)
    await ending(call)
    assert sorted(stage.charged) == [1, 2, 4]
