"""Storms over real vLLM workers and NIXL: fewer than over the simulated cluster, the same rules."""

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import KvTransferSettings, RouterConfig, VllmSettings
from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.worker import Pool
from tests.cluster.asking import greedy
from tests.cluster.processes import Cluster, cluster_of
from tests.slow.storm import Ending, Storm, Truth, Weather, Wish, check, ride_out
from tests.vllm.oracle import Oracle

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1800)]

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
SEEDS = (0, 5, 8, 10)  # between them every kind of fault, alone and together
MAX_MODEL_LEN = 4096
ENGINE = VllmSettings(dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=256, kv_cache_gib=0.25)
ROUTER = RouterConfig(
    listen="127.0.0.1:0", metrics="127.0.0.1:0", heartbeat_interval_s=0.2, heartbeat_timeout_s=4.0, deadline_s=120.0
)
KV = KvTransferSettings(peer_silent_s=2.0, lease_s=10.0)


def greedy_only(rng: random.Random, output: int) -> SamplingParams:
    return greedy(output)


WEATHER = Weather(
    requests=10,
    longest_prompt=3000,
    longest_output=200,
    round_s=4.0,
    stop_s=(0.2, 6.0),  # shorter and longer than the patience of peers (2 s) and of the router (4 s)
    faults_per_worker=(0, 1),
    deadline_s=60.0,
    patience_s=(3.0, 10.0),
    sampling=greedy_only,
)


@pytest.fixture(scope="module")
def oracle(sensitive_model: Path, cores: tuple[int, int]) -> Iterator[Oracle]:
    started = Oracle(sensitive_model, MAX_MODEL_LEN, cores[1])
    yield started
    started.close()


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, sensitive_model: Path, cores: tuple[int, int], oracle: Oracle
) -> Iterator[Cluster]:
    model = str(sensitive_model)
    with cluster_of(
        tmp_path_factory.mktemp("storms"), 0, 0, ENGINE, ROUTER.model_copy(update={"model": model}), KV
    ) as started:
        for name in WORKERS:
            pool = Pool(name.rpartition("-")[0])
            started.add(name, pool, model=model, cpu_core=cores[pool is Pool.DECODE])
        for worker in started.workers.values():
            worker.ready()
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, Retries(most=0)) as connected:
        yield connected


def truth_of(wish: Wish, oracle: Oracle) -> Truth:
    (tokens,) = oracle.continue_each([wish.prompt], wish.sampling.max_tokens or 0)
    return Truth(tuple(tokens), None, FinishReason.LENGTH)


async def test_requests_in_a_storm_end_exact_or_with_a_reason_and_leave_nothing_behind(
    cluster: Cluster, client: AsyncClient, oracle: Oracle
) -> None:
    endings: list[Ending] = []
    for storm in (Storm.drawn(seed, WEATHER, WORKERS) for seed in SEEDS):
        try:
            weathered = await ride_out(storm, client, cluster)
            for ending in weathered:
                check(ending, truth_of(ending.wish, oracle))
        except (AssertionError, ExceptionGroup) as error:
            error.add_note(str(storm))
            raise
        endings += weathered
    staying = [ending for ending in endings if not ending.wish.may_hang_up]
    assert sum(ending.complete for ending in staying) > len(staying) / 2, "hardly anything was served"
    assert any(ending.retried for ending in endings), "no fault met a request"
