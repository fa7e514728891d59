"""What SLO classes do to a request's life."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from splitserve.core.config import Late, RouterConfig, SloClass
from splitserve.core.errors import EngineError, InvalidRequest, Overloaded, SplitserveError, Unavailable
from splitserve.core.request import Chunk
from splitserve.core.worker import Failure, Objectives, Pool
from tests.unit.router.moving import Journeying, Phase, finish
from tests.unit.router.scripted import WITHIN_S, Stage, holds

CLASSES = {
    "easy": SloClass(ttft_s=100.0, ttft_per_token_s=1.0, tpot_s=50.0, itl_p99_s=60.0, priority=7),
    "impossible": SloClass(ttft_s=1e-9, priority=-3),
    "even": SloClass(itl_p99_s=1e-9),
    "strict": SloClass(ttft_s=0.02, late=Late.REFUSE),
}


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage(RouterConfig(slo_classes=CLASSES, max_attempts=3))
    yield stage
    stage.close()


async def ending(call: "asyncio.Task[Chunk]") -> Chunk:
    async with asyncio.timeout(WITHIN_S):
        return await call


def judged(stage: Stage) -> dict[str, tuple[int, int]]:
    """By class: outputs that ended, and that met every objective, as the metrics and as the status say."""
    found = {each.name: (each.ended, each.met) for each in stage.classes.status() if each.ended}
    for name, (ended, met) in found.items():
        counts = [
            stage.registry.get_sample_value("splitserve_slo_outputs_total", {"slo_class": name, "met": word}) or 0
            for word in ("yes", "no")
        ]
        assert counts == [met, ended - met]
    return found


# Judged once per output ---------------------------------------------------------------------------------------------
async def test_an_output_that_meets_every_objective_is_counted_so(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request(slo_class="easy")
    job = await decode.decode_job()
    decode.say(job, 10, 11)
    decode.finish(job, 12, 13, index=2)
    await ending(call)
    assert judged(stage) == {"easy": (1, 1)}


async def test_one_that_misses_an_objective_is_served_and_counted(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    for slo_class in ("impossible", "even"):
        call = stage.request(slo_class=slo_class)
        job = await decode.decode_job()
        decode.say(job, 10)
        await holds(lambda: stage.token_ids[-1:] == [10])
        decode.finish(job, 11, index=1)
        await ending(call)
    assert judged(stage) == {"impossible": (1, 0), "even": (1, 0)}


async def test_every_output_of_a_request_is_judged(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request(slo_class="easy", n=3)
    decode.finish(await decode.decode_job(), 10, 11, 12, 13)
    for _ in range(2):
        decode.finish(await decode.decode_job(), 10, 11, 12, 13)
    await ending(call)
    assert judged(stage) == {"easy": (3, 3)}


@pytest.mark.parametrize("failure", [Failure.ENGINE, Failure.TRANSFER])
async def test_one_that_fails_for_good_has_missed_once_whatever_it_tried(stage: Stage, failure: Failure) -> None:
    workers = [stage.worker(f"d{number}", Pool.DECODE) for number in range(4)]

    async def fails() -> None:
        while True:
            for worker in workers:
                if not worker.idle:
                    worker.fail(await worker.decode_job(), failure)
            await asyncio.sleep(0.001)

    failing = asyncio.create_task(fails())
    with pytest.raises((EngineError, Unavailable)):
        await ending(stage.request(slo_class="easy"))
    failing.cancel()
    assert judged(stage) == {"easy": (1, 0)}


async def test_one_whose_time_runs_out_has_missed(stage: Stage) -> None:
    stage.worker("d0", Pool.DECODE)
    with pytest.raises(SplitserveError, match="deadline_s"):
        await ending(stage.request(slo_class="easy", deadline_s=0.05))
    assert judged(stage) == {"easy": (1, 0)}


async def test_one_that_its_client_gives_up_is_not_judged(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request(slo_class="easy")
    job = await decode.decode_job()
    decode.say(job, 10)
    await stage.seen(1)
    call.cancel()
    await decode.cancelled_job(job)
    await asyncio.gather(call, return_exceptions=True)
    assert judged(stage) == {}


async def test_one_that_is_not_valid_is_not_judged(stage: Stage) -> None:
    stage.worker("d0", Pool.DECODE)
    with pytest.raises(InvalidRequest):
        await ending(stage.request(slo_class="easy", prompt=()))
    with pytest.raises(InvalidRequest, match=r"^slo_class: unknown; this router has interactive, standard"):
        await ending(stage.request(slo_class="gold"))
    assert judged(stage) == {}


async def test_one_whose_client_stops_reading_is_not_judged() -> None:
    limits = {"client_stall_s": 0.05}
    stage = Stage(RouterConfig.model_validate({"limits": limits}))
    decode = stage.worker("d0", Pool.DECODE)
    stage.writable.clear()
    call = stage.request(slo_class="interactive")
    decode.say(await decode.decode_job(), 10)
    with pytest.raises(Overloaded, match="read the stream faster"):
        await ending(call)
    assert judged(stage) == {}
    stage.close()


async def test_a_resumed_output_is_judged_by_the_tokens_made_here(stage: Stage) -> None:
    """Of the 100 tokens that its client brought none took any time here."""
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request(slo_class="even", output=range(100, 200), max_tokens=102)
    job = await decode.decode_job()
    decode.say(job, 10, index=100)
    await stage.seen(1)
    decode.finish(job, 11, index=101)
    last = await ending(call)
    assert judged(stage) == {"even": (1, 0)}
    assert last.timings is not None
    assert last.usage is not None
    assert last.usage.output_tokens == 102
    assert last.timings.tpot_s > 0.0


# What the workers are told ------------------------------------------------------------------------------------------
async def test_jobs_have_the_objectives_and_what_is_left_until_the_first_token(stage: Stage) -> None:
    prefill, decode = stage.pair()
    decode.report(free_sequences=0)
    call = stage.request(slo_class="easy", prompt=(5, 6, 7), priority=2)
    await holds(lambda: len(stage.waiting) == 1)
    decode.report(free_sequences=8)
    wanted, reading = await decode.decode_job(), await prefill.prefill_job()
    for job in (wanted, reading):
        assert 0.0 < 103.0 - job.objectives.first_token_s < WITHIN_S
        assert (job.objectives.tpot_s, job.objectives.itl_s) == (50.0, 60.0)
        assert job.priority == 9
    prefill.sent_kv(reading)
    decode.finish(wanted, 10, 11, 12, 13)
    await ending(call)


async def test_jobs_of_a_class_without_objectives_have_none(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request()
    job = await decode.decode_job()
    assert job.objectives == Objectives()
    decode.finish(job, 10, 11, 12, 13)
    await ending(call)


async def test_a_request_that_goes_on_elsewhere_is_due_anew(stage: Stage) -> None:
    """Its class allows so long to a first token, and as long to the next one from a new worker."""
    first, second = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    second.report(free_sequences=1)
    call = stage.request(slo_class="easy")
    job = await first.decode_job()
    first.say(job, 10)
    await stage.seen(1)
    served_at = time.monotonic()
    await holds(lambda: time.monotonic() > served_at + 0.05)
    first.die()
    again = await second.decode_job()
    assert again.objectives.first_token_s > job.objectives.first_token_s - 0.05
    second.finish(again, 11, 12, 13, index=1)
    await ending(call)
    assert judged(stage) == {"easy": (1, 1)}


async def test_a_request_that_moves_is_due_anew_where_it_goes(stage: Stage) -> None:
    journeying = Journeying(stage)
    await journeying.begin(slo_class="easy")
    began_at = time.monotonic()
    await holds(lambda: time.monotonic() > began_at + 0.05)
    await journeying.reach(Phase.ARRIVAL)
    left_s = journeying.arrived.objectives.first_token_s
    assert left_s > journeying.job.objectives.first_token_s - 0.05
    assert stage.journey is not None
    before, after = stage.journey.explain().decisions
    assert (before.ended, after.moved, after.waited_s, after.ended) == ("it was moved", True, 0.0, "")
    await finish(stage, journeying.call, journeying.target, journeying.arrived, 2)


# Refused ------------------------------------------------------------------------------------------------------------
async def test_a_class_that_refuses_says_so_once_the_first_token_is_due(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    decode.report(free_sequences=0)
    with pytest.raises(Overloaded, match=r"slo_class strict: .*0\.02 s") as refused:
        await ending(stage.request(slo_class="strict"))
    assert refused.value.retry_after_s > 0
    assert judged(stage) == {"strict": (1, 0)}
    assert stage.promised() == 0


async def test_further_outputs_of_a_prompt_are_not_refused(stage: Stage) -> None:
    """They set out when the first has its token, and would take it down with them."""
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request(slo_class="strict", n=2)
    job = await decode.decode_job()
    called_at = time.monotonic()
    await holds(lambda: time.monotonic() > called_at + 0.02)
    decode.finish(job, 10, 11, 12, 13)
    decode.finish(await decode.decode_job(), 10, 11, 12, 13)
    await ending(call)
    assert judged(stage) == {"strict": (2, 0)}
