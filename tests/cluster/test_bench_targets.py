"""The load generator's three targets, on real processes with simulated engines whose steps cost a known time.

Bounds are from below alone: a busy machine makes answers late, but nothing makes them early.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager

import numpy as np
import pytest

from splitserve.bench.open_loop import run
from splitserve.bench.run import Ending, Run
from splitserve.bench.targets.address import Opened, Options, opened, parse
from splitserve.client import AsyncClient
from splitserve.core.config import SimSettings
from splitserve.core.worker import Pool
from splitserve.workload.requests import Requests
from tests.cluster.asking import WAIT_S, eventually, settled
from tests.cluster.processes import ROUTER, Cluster, cluster_of

STEP_S, PREFILL_TOKEN_S = 0.01, 0.0002
ENGINE = SimSettings(step_s=STEP_S, prefill_token_s=PREFILL_TOKEN_S, decode_token_s=0.0)
VOCABULARY = 1000
PROMPTS, OUTPUTS = (500, 40, 200, 120, 300, 16), (8, 20, 1, 12, 5, 30)
REQUESTS = Requests(np.arange(6, dtype=np.float64) * 0.02, np.array(PROMPTS), np.array(OUTPUTS))
KINDS = ("router", "openai", "worker")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    router = ROUTER.model_copy(update={"http": "127.0.0.1:0"})
    with cluster_of(tmp_path_factory.mktemp("targets"), engine=ENGINE, router=router) as started:
        yield started


@asynccontextmanager
async def target_of(kind: str, cluster: Cluster) -> AsyncIterator[Opened]:
    """Afterwards nothing is left of it on the cluster."""
    if kind == "worker":
        async with _direct(cluster) as target:
            yield target
        return
    address = cluster.address if kind == "router" else f"http://{cluster.router.facts['http']}"
    async with opened(parse(address), Options(vocabulary=VOCABULARY)) as target:
        yield target
    async with AsyncClient(cluster.address) as client:
        await settled(client, 2)


@asynccontextmanager
async def _direct(cluster: Cluster) -> AsyncIterator[Opened]:
    """With a worker of its own."""
    said: list[str] = []

    async def start() -> None:
        async def listens() -> bool:
            return bool(said)

        await eventually(listens, "a bench that listens")
        cluster.add("direct", Pool.DECODE, routers=[said[0].rpartition("--router ")[2].rstrip("`")])

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(start())
        options = Options(vocabulary=VOCABULARY, say=said.append, attach_within_s=WAIT_S)
        async with opened(parse("worker://127.0.0.1:0"), options) as target:
            yield target
    cluster.kill("direct")


async def _run(target: Opened, seed: int = 0) -> Run:
    async with asyncio.timeout(WAIT_S):
        return await run(REQUESTS, target.send(REQUESTS, seed))


@pytest.mark.parametrize("kind", KINDS)
async def test_timelines_are_those_of_the_engines_steps(cluster: Cluster, kind: str) -> None:
    async with target_of(kind, cluster) as target:
        found = await _run(target, seed=KINDS.index(kind))  # nothing that was asked before
    assert target.facts["kind"] == kind
    assert found.count(Ending.DONE) == len(REQUESTS), found.errors
    assert found.tokens.tolist() == list(OUTPUTS)
    assert found.short == 0
    assert _tokens_logged(found) == list(OUTPUTS)
    assert (np.diff(found.chunks.time_s) >= 0).all()
    timelines = found.timelines
    prefill_s = STEP_S + np.array(PROMPTS) * PREFILL_TOKEN_S
    assert (timelines.ttft_s >= prefill_s).all()
    assert (timelines.last_token - timelines.arrival >= prefill_s + (np.array(OUTPUTS) - 1) * STEP_S).all()


def _tokens_logged(found: Run) -> list[int]:
    return [int(found.chunks.tokens[found.chunks.request == index].sum()) for index in range(len(found))]


async def test_the_same_prompt_gives_the_same_tokens_through_all_three(cluster: Cluster) -> None:
    answers = []
    for kind in KINDS:
        async with target_of(kind, cluster) as target:
            answers.append(await _ids(target, list(range(300, 420)), 24))
            assert await _ids(target, list(range(301, 421)), 24) != answers[-1]
    assert [len(ids) for ids in answers] == [24] * 3
    assert answers[0] == answers[1] == answers[2]


async def _ids(target: Opened, prompt: list[int], output_tokens: int) -> list[int]:
    heard: list[int] = []
    async with asyncio.timeout(WAIT_S), aclosing(target.ask(prompt, output_tokens, heard.extend)) as chunks:
        assert sum([tokens async for tokens in chunks]) == output_tokens
    return heard


@pytest.mark.parametrize("kind", KINDS)
async def test_a_run_that_is_cut_off_leaves_nothing_behind(cluster: Cluster, kind: str) -> None:
    """The fixture's router counts the blocks; a worker asked directly takes as much as before."""
    async with target_of(kind, cluster) as target:
        chunks = target.ask(list(range(300, 500)), 1000)
        async with asyncio.timeout(WAIT_S):
            assert await anext(chunks) > 0
        await chunks.aclose()
        assert (await _run(target)).count(Ending.DONE) == len(REQUESTS)
