"""The life of a request, with a client that hangs up and a worker that dies at each step."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from splitserve.core.config import RouterConfig
from splitserve.core.errors import DeadlineExceeded, EngineError, InvalidRequest, SplitserveError, Unavailable
from splitserve.core.request import Chunk, FinishReason, Usage
from splitserve.core.worker import Failure, KvMode, Pool
from tests.unit.router.scripted import WITHIN_S, ScriptedWorker, Stage

SHORT_S = 0.05


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


async def ending(call: "asyncio.Task[Chunk]") -> Chunk:
    async with asyncio.timeout(WITHIN_S):
        return await call


async def failure(call: "asyncio.Task[Chunk]") -> SplitserveError:
    with pytest.raises(SplitserveError) as raised:
        await ending(call)
    return raised.value


# All goes well ------------------------------------------------------------------------------------------------------
async def test_the_decode_job_goes_out_with_the_prefill_job_and_both_know_each_other(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request(prompt=(5, 6, 7))
    wanted, reading = await decode.decode_job(), await prefill.prefill_job()
    assert wanted.prompt == reading.prompt == (5, 6, 7)
    assert wanted.ticket == reading.ticket
    assert wanted.ticket is not None
    assert (wanted.ticket.source, wanted.ticket.destination) == (prefill.info.kv_peers, decode.info.kv_peers)
    prefill.sent_kv(reading)
    decode.finish(wanted, 10, 11, 12, 13)
    last = await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]
    assert (last.finish_reason, last.usage) == (FinishReason.LENGTH, Usage(3, 4))
    assert last.timings is not None
    assert (last.timings.prefill_worker, last.timings.decode_worker, last.timings.attempts) == ("p0", "d0", 1)
    assert (last.timings.kv_bytes, last.timings.kv_bytes_before_prefill_ended) == (4096, 2048)


async def test_tokens_reach_the_client_once_and_in_order_whatever_is_repeated(stage: Stage) -> None:
    _, decode = stage.pair()
    call = stage.request()
    job = await decode.decode_job()
    decode.say(job, 10, 11)
    decode.say(job, 10, 11)
    decode.finish(job, 12, 13, index=2)
    await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]
    assert stage.text_out == "<10><11><12><13>"
    ends = [chunk.index + len(chunk.token_ids) for chunk in stage.chunks]
    assert [chunk.index for chunk in stage.chunks] == [0, *ends[:-1]]


async def test_tokens_that_come_while_the_client_is_busy_go_out_as_one_chunk(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request()
    job = await decode.decode_job()
    decode.say(job, 10)
    await stage.seen(1)
    stage.writable.clear()
    for index in (1, 2):
        decode.say(job, 10 + index, index=index)
        await asyncio.sleep(0)
    decode.finish(job, 13, index=3)
    stage.writable.set()
    await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]
    assert len(stage.chunks) <= 3


async def test_in_pull_mode_the_decode_job_follows_the_prefills_handover(stage: Stage) -> None:
    prefill, decode = stage.pair(KvMode.PULL)
    call = stage.request()
    reading = await prefill.prefill_job()
    assert decode.idle
    prefill.sent_kv(reading)
    job = await decode.decode_job()
    assert job.ticket is not None
    assert job.ticket.handover == b"from here"
    decode.finish(job, 10)
    await ending(call)


async def test_unset_max_tokens_is_what_the_model_leaves(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request(prompt=(5,) * 250, max_tokens=None)
    job = await decode.decode_job()
    assert job.sampling.max_tokens == 6
    decode.finish(job, 10, stop=True)
    assert (await ending(call)).finish_reason is FinishReason.STOP


async def test_adapter_and_salt_go_to_both_workers(stage: Stage) -> None:
    prefill, decode = (stage.worker(n, p, loras=("poet",)) for n, p in (("p0", Pool.PREFILL), ("d0", Pool.DECODE)))
    stage.request(lora="poet", cache_salt="ours")
    for job in (await decode.decode_job(), await prefill.prefill_job()):
        assert (job.lora, job.cache_salt) == ("poet", "ours")


async def test_an_adapter_is_asked_only_of_workers_that_have_it(stage: Stage) -> None:
    stage.pair()
    poet = stage.worker("d1", Pool.DECODE, loras=("poet",))
    stage.request(lora="poet")
    assert (await poet.decode_job()).ticket is None


async def test_prompt_logprobs_are_computed_where_the_request_decodes(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request(prompt_logprobs=1)
    job = await decode.decode_job()
    assert (job.ticket, job.sampling.prompt_logprobs, prefill.idle) == (None, 1, True)
    decode.say(job, 10)
    await stage.seen(1)
    spare = stage.worker("d1", Pool.DECODE)
    decode.die()
    resumed = await spare.decode_job()
    assert resumed.sampling.prompt_logprobs is None  # the client has them
    assert (await prefill.prefill_job()).ticket == resumed.ticket
    spare.finish(resumed, 11, index=1, stop=True)
    await ending(call)


async def test_a_client_goes_on_with_the_output_that_an_earlier_stream_gave_it(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request(output=(10, 11), max_tokens=4)
    job, reading = await decode.decode_job(), await prefill.prefill_job()
    assert (job.output, job.sampling.max_tokens, reading.prompt) == ((10, 11), 4, (5, 6, 7, 8, 10, 11))
    decode.finish(job, 12, 13, index=2)
    prefill.sent_kv(reading)
    last = await ending(call)
    assert (stage.token_ids, stage.chunks[0].index, last.usage) == ([12, 13], 2, Usage(4, 4))
    assert stage.charged == [4, 2]


async def test_an_output_that_has_its_end_already_needs_no_worker(stage: Stage) -> None:
    last = await ending(stage.request(output=(10, 1)))
    assert (last.finish_reason, last.index, last.usage, last.timings) == (FinishReason.STOP, 2, Usage(4, 2), None)


async def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request()
    job = await decode.decode_job()
    assert job.ticket is None
    decode.finish(job, 10)
    last = await ending(call)
    assert last.timings is not None
    assert (last.timings.prefill_worker, last.timings.kv_bytes, last.timings.transfer_s) == ("", 0, 0.0)


async def test_a_request_waits_in_the_router_until_a_worker_grants_room(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    decode.report(free_sequences=0)
    call = stage.request()
    await asyncio.sleep(0)
    assert decode.idle
    assert len(stage.waiting) == 1
    decode.report(free_sequences=1)
    decode.finish(await decode.decode_job(), 10)
    await ending(call)


# A worker fails -----------------------------------------------------------------------------------------------------
async def test_a_full_worker_is_asked_again_after_its_next_report_and_it_counts_as_no_failure() -> None:
    stage = Stage(RouterConfig(max_attempts=1))
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request()
    first = await decode.decode_job()
    decode.fail(first, Failure.NOT_NOW)
    await asyncio.sleep(0)
    assert decode.idle
    decode.report()
    again = await decode.decode_job()
    assert again.job_id != first.job_id
    decode.finish(again, 10)
    last = await ending(call)
    assert last.timings is not None
    assert last.timings.attempts == 2
    stage.close()


async def test_a_decode_worker_lost_before_the_first_token_is_replaced(stage: Stage) -> None:
    prefill, decode = stage.pair()
    spare = stage.worker("d1", Pool.DECODE)
    call = stage.request()
    first, reading = await decode.decode_job(), await prefill.prefill_job()
    decode.die()
    second, reading_again = await spare.decode_job(), await prefill.prefill_job()
    await prefill.cancelled_job(reading)
    assert first.ticket is not None
    assert second.ticket is not None
    assert second.ticket.transfer_id == first.ticket.transfer_id
    assert second.ticket.epoch > first.ticket.epoch
    assert len({reading.job_id, reading_again.job_id, first.job_id, second.job_id}) == 4
    prefill.sent_kv(reading_again)
    spare.finish(second, 10, 11, 12, 13)
    await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]


async def test_a_decode_worker_lost_in_mid_stream_is_resumed_from_what_the_client_has(stage: Stage) -> None:
    prefill, decode = stage.pair()
    spare = stage.worker("d1", Pool.DECODE)
    call = stage.request(prompt=(5, 6))
    decode_job = await decode.decode_job()
    prefill.sent_kv(await prefill.prefill_job())
    decode.say(decode_job, 10, 11)
    decode.die()
    resumed, reading = await spare.decode_job(), await prefill.prefill_job()
    assert (resumed.prompt, resumed.output) == ((5, 6), (10, 11))
    assert resumed.sampling.max_tokens == 4
    assert reading.prompt == (5, 6, 10, 11)
    prefill.sent_kv(reading)
    spare.finish(resumed, 12, 13, index=2)
    last = await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]
    assert last.usage == Usage(2, 4)
    assert last.timings is not None
    assert (last.timings.decode_worker, last.timings.attempts) == ("d1", 2)
    assert stage.registry.get_sample_value("splitserve_resumed_requests_total") == 1


async def test_the_last_decode_worker_lost_leaves_the_prefill_worker_to_serve_alone(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request()
    decode_job = await decode.decode_job()
    prefill.sent_kv(await prefill.prefill_job())
    decode.say(decode_job, 10)
    decode.die()
    resumed = await prefill.decode_job()
    assert (resumed.output, resumed.ticket) == ((10,), None)
    prefill.finish(resumed, 11, 12, 13, index=1)
    await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]


async def test_a_lost_worker_that_had_made_everything_is_not_replaced(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    stage.worker("d1", Pool.DECODE)
    call = stage.request(max_tokens=2)
    decode.say(await decode.decode_job(), 10, 11)
    decode.die()
    assert (await ending(call)).finish_reason is FinishReason.LENGTH
    assert stage.token_ids == [10, 11]


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "seed"])
async def test_a_worker_that_takes_up_a_sampler_state_gets_the_output_that_it_follows_from(
    stage: Stage, field: str
) -> None:
    decode, spare = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    call = stage.request(**{field: 1})  # type: ignore[arg-type]
    decode.say(await decode.decode_job(), 10)
    await stage.seen(1)
    decode.die()
    resumed = await spare.decode_job()
    assert resumed.output == (10,)
    assert getattr(resumed.sampling, field) == 1
    spare.finish(resumed, 11, 12, 13, index=1)
    await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]


async def test_a_worker_that_can_not_take_up_a_sampler_state_says_so_to_the_client(stage: Stage) -> None:
    decode, spare = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    call = stage.request(presence_penalty=0.5)
    decode.say(await decode.decode_job(), 10)
    await stage.seen(1)
    decode.die()
    spare.fail(await spare.decode_job(), Failure.INVALID)
    assert isinstance(await failure(call), InvalidRequest)


@pytest.mark.parametrize("how", ["dies", "transfer", "engine", "cancelled"])
async def test_a_prefill_that_fails_before_its_kv_arrived_is_tried_elsewhere(stage: Stage, how: str) -> None:
    prefill, decode = stage.pair()
    call = stage.request()
    waiting, reading = await decode.decode_job(), await prefill.prefill_job()
    if how == "dies":
        prefill.die()
    else:
        prefill.fail(reading, Failure(how))
    await decode.cancelled_job(waiting)
    alone = await decode.decode_job()
    assert alone.ticket is None, "no other prefill worker: the decode worker computes by itself"
    decode.finish(alone, 10, 11, 12, 13)
    await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]


async def test_a_full_prefill_worker_gives_the_decode_job_back(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request()
    waiting, reading = await decode.decode_job(), await prefill.prefill_job()
    prefill.fail(reading, Failure.NOT_NOW)
    await decode.cancelled_job(waiting)
    decode.fail(waiting, Failure.CANCELLED)
    prefill.report()
    again = await decode.decode_job()
    assert again.ticket is not None, "a full worker is not at fault: it is used again"
    decode.finish(again, 10)
    await ending(call)


async def test_a_prefill_worker_lost_after_its_kv_arrived_changes_nothing(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request()
    job = await decode.decode_job()
    prefill.sent_kv(await prefill.prefill_job())
    prefill.die()
    decode.finish(job, 10, 11, 12, 13)
    last = await ending(call)
    assert last.timings is not None
    assert last.timings.attempts == 1


async def test_kv_that_did_not_arrive_is_blamed_on_its_source(stage: Stage) -> None:
    prefill, decode = stage.pair()
    other = stage.worker("p1", Pool.PREFILL)
    call = stage.request()
    waiting, reading = await decode.decode_job(), await prefill.prefill_job()
    decode.fail(waiting, Failure.TRANSFER)
    await prefill.cancelled_job(reading)
    again = await decode.decode_job()
    assert again.ticket is not None
    assert again.ticket.source == other.info.kv_peers
    decode.finish(again, 10)
    await ending(call)


async def test_an_engine_that_fails_is_avoided_and_named_when_nothing_else_helps() -> None:
    stage = Stage(RouterConfig(max_attempts=2))
    first, second = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    call = stage.request()
    first.fail(await first.decode_job(), Failure.ENGINE)
    second.fail(await second.decode_job(), Failure.ENGINE)
    error = await failure(call)
    assert isinstance(error, EngineError)
    assert "d1" in str(error)
    stage.close()


async def test_a_request_that_breaks_engines_does_not_go_through_the_whole_fleet(stage: Stage) -> None:
    workers = [stage.worker(f"d{number}", Pool.DECODE) for number in range(4)]
    call = stage.request()
    for worker in workers[:2]:
        worker.fail(await worker.decode_job(), Failure.ENGINE)
    assert isinstance(await failure(call), EngineError)
    assert all(worker.idle for worker in workers[2:])


async def test_what_a_worker_finds_wrong_with_the_request_is_the_clients_to_hear(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request()
    decode.fail(await decode.decode_job(), Failure.INVALID, field="sampling.stop")
    error = await failure(call)
    assert isinstance(error, InvalidRequest)
    assert error.field == "sampling.stop"


async def test_a_gap_in_the_tokens_is_never_shown_to_the_client(stage: Stage) -> None:
    decode, spare = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    call = stage.request()
    job = await decode.decode_job()
    decode.say(job, 10)
    decode.say(job, 12, index=2)
    resumed = await spare.decode_job()
    assert resumed.output == (10,)
    spare.finish(resumed, 11, 12, 13, index=1)
    await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]


async def test_a_stale_attempts_tokens_are_ignored(stage: Stage) -> None:
    decode, spare = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    call = stage.request(inter_token_deadline_s=SHORT_S)
    stale = await decode.decode_job()
    decode.say(stale, 10)
    resumed = await spare.decode_job()
    decode.say(stale, 99, index=1)
    spare.finish(resumed, 11, 12, 13, index=1)
    await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]


async def test_a_request_id_used_again_does_not_meet_the_jobs_of_its_first_use(stage: Stage) -> None:
    """Nor those of another router: ids are the clients' to choose."""
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request(request_id="mine")
    old = await decode.decode_job()
    call.cancel()
    await asyncio.wait({call})
    again = stage.request(request_id="mine")
    new = await decode.decode_job()
    assert new.job_id != old.job_id
    decode.fail(old, Failure.CANCELLED)
    decode.finish(new, 10, 11, 12, 13)
    assert (await ending(again)).timings.attempts == 1  # type: ignore[union-attr]


async def test_in_pull_mode_a_decode_worker_that_left_and_came_back_is_not_sent_what_it_was_promised_before(
    stage: Stage,
) -> None:
    prefill, decode = stage.pair(KvMode.PULL)
    call = stage.request()
    reading = await prefill.prefill_job()
    decode.die()
    stage.workers.remove(decode)
    stage.workers.append(ScriptedWorker(stage.membership, decode.info))
    prefill.sent_kv(reading)
    prefill.finish(await prefill.decode_job(), 10, 11, 12, 13)
    last = await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]
    assert last.timings is not None
    assert last.timings.attempts == 2


async def test_without_any_worker_left_the_request_ends_with_the_reason(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request()
    await decode.decode_job()
    decode.die()
    error = await failure(call)
    assert isinstance(error, Unavailable)
    assert "d0 is gone" in str(error)


# Time ---------------------------------------------------------------------------------------------------------------
async def test_a_worker_silent_in_mid_stream_is_left_for_another(stage: Stage) -> None:
    decode, spare = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    call = stage.request(inter_token_deadline_s=SHORT_S)
    job = await decode.decode_job()
    decode.say(job, 10)
    resumed = await spare.decode_job()
    await decode.cancelled_job(job)
    spare.finish(resumed, 11, 12, 13, index=1)
    await ending(call)


async def test_a_silent_worker_without_another_ends_the_request_by_name(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request(inter_token_deadline_s=SHORT_S)
    await decode.decode_job()
    error = await failure(call)
    assert isinstance(error, DeadlineExceeded)
    assert "inter_token_deadline_s" in str(error)
    assert "d0" in str(error)


async def test_a_silent_prefill_worker_leaves_the_decode_worker_to_compute(stage: Stage) -> None:
    _, decode = stage.pair()
    call = stage.request(inter_token_deadline_s=SHORT_S)
    await decode.decode_job()
    alone = await decode.decode_job()
    assert alone.ticket is None
    decode.finish(alone, 10)
    await ending(call)


@pytest.mark.parametrize("workers", [0, 1])
async def test_the_deadline_ends_a_request_wherever_it_is(stage: Stage, workers: int) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    if not workers:
        decode.report(free_sequences=0)
    error = await failure(stage.request(deadline_s=SHORT_S))
    assert isinstance(error, DeadlineExceeded)
    assert "deadline_s" in str(error)


async def test_the_deadline_cancels_both_jobs(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request(deadline_s=SHORT_S)
    wanted, reading = await decode.decode_job(), await prefill.prefill_job()
    await failure(call)
    await decode.cancelled_job(wanted)
    await prefill.cancelled_job(reading)


# The client hangs up ------------------------------------------------------------------------------------------------
Step = Callable[[Stage, ScriptedWorker, ScriptedWorker], Awaitable[None]]


async def _while_waiting(stage: Stage, prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    await asyncio.sleep(0)


async def _once_dispatched(stage: Stage, prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    await decode.decode_job()


async def _in_mid_stream(stage: Stage, prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    decode.say(await decode.decode_job(), 10)
    await stage.seen(1)


async def _while_the_last_chunk_settles(stage: Stage, prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    decode.finish(await decode.decode_job(), 10, 11, 12, 13)
    await stage.seen(4)


@pytest.mark.parametrize("step", [_while_waiting, _once_dispatched, _in_mid_stream, _while_the_last_chunk_settles])
async def test_a_client_that_hangs_up_takes_its_jobs_along(stage: Stage, step: Step) -> None:
    prefill, decode = stage.pair()
    if step is _while_waiting:
        prefill.report(prefill_token_limit=0)
    call = stage.request()
    await step(stage, prefill, decode)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending(call)
    assert len(stage.waiting) == 0
    if step is _while_waiting:
        assert stage.promised() == 0
        return
    await prefill.cancelled_job(await prefill.prefill_job())


async def test_a_route_bound_for_a_client_that_has_just_hung_up_is_given_back(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    decode.report(free_sequences=0)
    call = stage.request()
    await asyncio.sleep(0)
    decode.report(free_sequences=1)  # binds, but the journey has not run since
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending(call)
    assert stage.promised() == 0
    following = stage.request(request_id="next")
    decode.finish(await decode.decode_job(), 10)
    await ending(following)
