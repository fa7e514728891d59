"""Why a request has the workers that it has: to the operator who asks, and in the log."""

import asyncio
import logging
from collections.abc import AsyncIterator
from math import inf

import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import RouterConfig, SloClass
from splitserve.core.errors import InvalidRequest
from splitserve.core.request import Chunk, FinishReason, SamplingParams
from splitserve.core.worker import Failure, Outcome, Pool
from splitserve.router.decisions import KEPT, Decisions
from splitserve.router.waiting import Binding
from splitserve.telemetry.logs import Logger
from tests.unit.router.scripted import WITHIN_S, Stage, holds, worker_info
from tests.unit.router.test_late import COST
from tests.unit.router.wired import WiredWorker, router

CLASSES = {"chat": SloClass(ttft_s=50.0, ttft_per_token_s=0.5, tpot_s=1.0, priority=-10)}


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage(RouterConfig(slo_classes=CLASSES))
    yield stage
    stage.close()


async def ending(call: "asyncio.Task[Chunk]") -> Chunk:
    async with asyncio.timeout(WITHIN_S):
        return await call


async def test_a_waiting_request_knows_its_place_and_what_it_waits_for(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE, step_cost=COST)
    decode.report(free_sequences=0)
    calls, journeys = [], []
    for slo_class in ("chat", "standard"):
        calls.append(stage.request(slo_class=slo_class, priority=1))
        journeys.append(stage.journey)
        await holds(lambda: len(stage.waiting) == len(calls))
    first, second = (journey.explain() for journey in journeys if journey is not None)
    assert (first.slo_class, first.priority, first.prompt_tokens, first.output_tokens) == ("chat", -9, 4, 0)
    assert (first.ttft_s, first.tpot_s, first.itl_p99_s) == (52.0, 1.0, inf)
    assert first.place == 1
    assert "serves it and everyone there well enough" in first.waits_for
    assert (second.place, second.waits_for) == (2, "for those ahead of it to go")
    assert first.decisions == second.decisions == ()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_running_request_knows_what_was_predicted_and_what_came_of_it(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE, step_cost=COST)
    decode.report(free_sequences=7)  # all: one is kept for prompts
    call = stage.request(slo_class="chat")
    job = await decode.decode_job()
    assert stage.journey is not None
    (before,) = stage.journey.explain().decisions
    assert (before.decode_worker, before.prefill_worker, before.moved, before.predicted) == ("d0", "", False, True)
    assert before.read_s == before.ttft_s == pytest.approx(0.04)
    assert 0.0 < before.left_s <= 52.0
    assert (before.behind, before.first_token_s, before.ended) == (0, -1.0, "")
    decode.say(job, 10)
    await stage.seen(1)
    explanation = stage.journey.explain()
    (after,) = explanation.decisions
    assert 0.0 < after.first_token_s <= after.since_s <= explanation.since_s
    assert (explanation.place, explanation.waits_for, explanation.output_tokens) == (0, "", 1)
    decode.finish(job, 11, 12, 13, index=1)
    await ending(call)


async def test_every_attempt_is_told_and_how_it_ended(stage: Stage) -> None:
    first, second = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    call = stage.request()
    first.fail(await first.decode_job(), Failure.ENGINE)
    job = await second.decode_job()
    assert stage.journey is not None
    one, other = stage.journey.explain().decisions
    assert (one.decode_worker, one.predicted, one.first_token_s) == ("d0", False, -1.0)
    assert "scripted engine" in one.ended
    assert (other.decode_worker, other.ended, other.left_s) == ("d1", "", inf)
    second.finish(job, 10, 11, 12, 13)
    await ending(call)


def test_a_request_that_moves_often_does_not_grow() -> None:
    decisions = Decisions()
    for number in range(3 * KEPT):
        binding = Binding(worker_info(f"d{number}", Pool.DECODE), None, "r/1", float(number))
        decisions.bound(binding, float(number), inf, moved=True, logger=Logger("test"))
    told = decisions.told(now=100.0)
    assert [each.decode_worker for each in told] == [f"d{number}" for number in range(2 * KEPT, 3 * KEPT)]
    assert all(each.moved for each in told)


# In the log ---------------------------------------------------------------------------------------------------------
async def routes_logged(stage: Stage, caplog: pytest.LogCaptureFixture, level: int) -> list[dict[str, object]]:
    decode = stage.worker("d0", Pool.DECODE, step_cost=COST)
    decode.report(free_sequences=7)
    caplog.set_level(level, "splitserve.router")
    for slo_class in ("chat", "standard"):
        call = stage.request(slo_class=slo_class)
        decode.finish(await decode.decode_job(), 10, 11, 12, 13)
        await ending(call)
    return [vars(record)["splitserve_fields"] for record in caplog.records if record.getMessage() == "route"]


async def test_a_debug_line_gives_the_terms_of_a_decision_by_prediction(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    (fields,) = await routes_logged(stage, caplog, logging.DEBUG)
    assert (fields["decode"], fields["prefill"], fields["waiting"]) == ("d0", "", 0)
    assert fields["ttft_s"] == fields["read_s"] == pytest.approx(0.04)
    assert isinstance(fields["slack_s"], float)
    assert 0.0 < fields["slack_s"] <= 52.0


async def test_nothing_is_logged_of_decisions_otherwise(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    assert await routes_logged(stage, caplog, logging.INFO) == []


# Over the wire ------------------------------------------------------------------------------------------------------
async def test_an_operator_is_told_by_the_requests_id() -> None:
    async with router() as serving, AsyncClient(serving.address, Retries(most=0)) as client:
        with pytest.raises(InvalidRequest, match="request_id: no request 'r' runs"):
            await client.explain("r")
        async with WiredWorker(serving.address, "d0", Pool.DECODE) as worker:
            stream = client.generate((5, 6, 7), SamplingParams(max_tokens=2), request_id="r")
            call = asyncio.create_task(anext(stream))
            job = await worker.job()
            explanation = await client.explain("r")
            (decision,) = explanation.decisions
            assert (explanation.request_id, explanation.prompt_tokens, explanation.ttft_s) == ("r", 3, inf)
            assert (decision.decode_worker, decision.predicted, decision.first_token_s) == ("d0", False, -1.0)
            worker.say(job, 10, 11, outcome=Outcome(FinishReason.LENGTH))
            await ending(call)
            await stream.aclose()
