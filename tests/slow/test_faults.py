"""Storms over a simulated cluster: whatever dies, stops, moves or leaves, each request ends exact or with a reason."""

import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import SimSettings
from splitserve.core.request import SamplingParams
from tests.cluster.asking import greedy, prompt_of
from tests.cluster.conftest import Expected
from tests.cluster.processes import Cluster, cluster_of
from tests.slow.storm import Ending, Storm, Truth, Weather, Wish, check, ride_out

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
ROUNDS_PER_TEST = 8
# A prompt of 3,000 tokens takes 0.75 s, 120 tokens 0.6 s: faults meet requests at every stage.
ENGINE = SimSettings(step_s=0.005, prefill_token_s=0.00025, decode_token_s=0.00001, max_num_batched_tokens=256)


def any_sampling(rng: random.Random, output: int) -> SamplingParams:
    """All of it deterministic: a function of the prompt, the tokens before and a seed."""
    plain = replace(greedy(output), ignore_eos=rng.random() < 0.5)
    features = (
        plain,
        replace(plain, repetition_penalty=1.3),
        replace(plain, presence_penalty=0.5),
        replace(plain, logprobs=2),
        replace(plain, stop=("the", "qu", "."), min_tokens=output // 2),
        replace(plain, stop_token_ids=tuple(rng.sample(range(300, 2000), k=50))),
        replace(plain, temperature=0.8, top_p=0.9, seed=rng.randrange(2**31)),
        replace(plain, temperature=1.2, top_k=8, min_p=0.01, seed=rng.randrange(2**31)),
    )
    return rng.choice(features)


WEATHER = Weather(
    requests=14,
    longest_prompt=3000,
    longest_output=120,
    round_s=2.0,
    stop_s=(0.1, 3.5),  # shorter and longer than the patience of peers (1 s) and of the router (2 s)
    faults_per_worker=(0, 2),
    deadline_s=25.0,
    patience_s=(0.5, 3.0),
    sampling=any_sampling,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("faults"), 2, 2, ENGINE) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, Retries(most=0)) as connected:
        yield connected


async def truth_of(wish: Wish, expected: Expected) -> Truth:
    answer = await expected(wish.prompt, wish.sampling)
    assert answer.last.finish_reason is not None
    return Truth(answer.token_ids, answer.text, answer.last.finish_reason)


async def weathered(storm: Storm, client: AsyncClient, cluster: Cluster, expected: Expected) -> list[Ending]:
    try:
        endings = await ride_out(storm, client, cluster)
        for ending in endings:
            check(ending, await truth_of(ending.wish, expected))
    except (AssertionError, ExceptionGroup) as error:
        error.add_note(str(storm))
        raise
    return endings


@pytest.mark.parametrize("first_seed", range(0, 4 * ROUNDS_PER_TEST, ROUNDS_PER_TEST))
async def test_requests_in_a_storm_end_exact_or_with_a_reason_and_leave_nothing_behind(
    cluster: Cluster, client: AsyncClient, expected: Expected, first_seed: int
) -> None:
    endings: list[Ending] = []
    for seed in range(first_seed, first_seed + ROUNDS_PER_TEST):
        endings += await weathered(Storm.drawn(seed, WEATHER, WORKERS), client, cluster, expected)
    staying = [ending for ending in endings if not ending.wish.may_hang_up]
    assert sum(ending.complete for ending in staying) > len(staying) / 2, "hardly anything was served"
    assert any(ending.retried for ending in endings), "no fault met a request"


async def test_tokens_of_another_prompt_are_noticed(cluster: Cluster, client: AsyncClient, expected: Expected) -> None:
    """The negative twin: the same checks, with the truth of another prompt."""
    wish = Wish(prompt_of(100), greedy(20), 0.0, 25.0, 5.0, None, None)
    calm = Storm(0, (wish,), ())
    (ending,) = await ride_out(calm, client, cluster)
    check(ending, await truth_of(wish, expected))
    with pytest.raises(AssertionError):
        check(ending, await truth_of(replace(wish, prompt=prompt_of(101)), expected))
