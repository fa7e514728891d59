"""When a router is told of a worker's load."""

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from math import inf

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.model import ModelInfo
from splitserve.core.request import FinishReason
from splitserve.core.worker import Delta, Load, Outcome, Pace, Pool
from splitserve.engine.protocol import EngineLoad
from splitserve.worker.link import PACE_S, is_news
from tests.unit.worker.fakes import ScriptedEngine, Stream, a_decode, router_at, running

TOLD = Load(0, 100, 8, 0, 128, 50, 0, 0, 0, Pool.DECODE, False, 0)
PACED = replace(TOLD, tpot_s=0.05, slack_s=0.2)
LONG_S = 60.0  # between two heartbeats


@pytest.mark.parametrize(
    "load",
    [
        replace(TOLD, free_blocks=99),
        replace(TOLD, seen_jobs=1),
        replace(TOLD, draining=True),
        replace(TOLD, pool=Pool.PREFILL),
    ],
)
def test_another_grant_is_news_at_once(load: Load) -> None:
    assert is_news(load, TOLD, 0.0)


def test_tokens_are_no_news() -> None:
    assert not is_news(replace(PACED, produced_tokens=64), PACED, 2 * PACE_S)


def test_how_steps_go_is_no_news_while_no_decode_has_an_objective() -> None:
    assert not is_news(replace(TOLD, slowdown=2.0), TOLD, 2 * PACE_S)


def test_the_slack_of_decodes_is_told_every_so_often() -> None:
    for changed in (replace(PACED, slack_s=0.1), replace(PACED, slowdown=1.1)):
        assert not is_news(changed, PACED, 0.9 * PACE_S)
        assert is_news(changed, PACED, PACE_S)


def test_another_tightest_objective_is_news_at_once() -> None:
    assert is_news(PACED, TOLD, 0.0)
    assert is_news(TOLD, PACED, 0.0)
    assert is_news(replace(PACED, tpot_s=0.04), PACED, 0.0)


@pytest.fixture
async def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def stream(engine: ScriptedEngine) -> AsyncIterator[Stream]:
    """Of a router that asks for hardly any heartbeats."""
    async with router_at() as router:
        router.heartbeat_s = LONG_S
        async with running(engine, [router], ModelInfo.read(DEMO_MODEL)):
            yield await router.next_stream()


async def test_a_worker_whose_decodes_have_no_objectives_tells_no_load_per_step(
    engine: ScriptedEngine, stream: Stream
) -> None:
    stream.send_job(a_decode("a"))
    await engine.next_job()
    engine.step(Delta("a"))
    await stream.next_load(lambda load: load.seen_jobs == 1 and load.prefill_tokens == 0)
    loads = len(stream.loads)
    for number in range(50):
        engine.held = EngineLoad(100, 0, 0, pace=Pace(slowdown=1.0 + number / 100))
        engine.step(Delta("a"))
        await stream.until(partial(_has_deltas, stream, number + 2))
    assert len(stream.loads) == loads


async def test_a_worker_whose_decodes_get_an_objective_or_lose_the_last_one_says_so_at_once(
    engine: ScriptedEngine, stream: Stream
) -> None:
    engine.held = EngineLoad(100, 0, 0, pace=Pace(0.05, 0.2, 1.1))
    stream.send_job(a_decode("a"))
    await engine.next_job()
    load = await stream.next_load(lambda load: load.tpot_s == 0.05)
    assert (load.slack_s, load.slowdown) == (0.2, 1.1)
    engine.held = EngineLoad(100, 0, 0, pace=Pace(0.05, 0.1, 1.1))
    await stream.next_load(lambda load: load.slack_s == 0.1)
    engine.held = EngineLoad(100, 0, 0)
    engine.step(Delta("a", 0, (5,), "x", outcome=Outcome(finish_reason=FinishReason.LENGTH)))
    load = await stream.next_load(lambda load: load.produced_tokens == 1)
    assert (load.tpot_s, load.slack_s) == (inf, inf)


def _has_deltas(stream: Stream, count: int) -> bool:
    return len(stream.deltas) == count
