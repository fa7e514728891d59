"""The same promises with `kv_transfer.mode: pull`, where decode starts after prefill and fetches its KV."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from splitserve.client import AsyncClient
from splitserve.core.worker import KvMode
from tests.cluster.asking import ask, greedy, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import KV, Cluster, cluster_of


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pull = KV.model_copy(update={"mode": KvMode.PULL})
    with cluster_of(tmp_path_factory.mktemp("pull"), prefill=2, decode=2, kv=pull) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address) as connected:
        yield connected
        for name, process in list(cluster.workers.items()):
            if process.exited:
                cluster.restart(name).ready()
        await settled(connected, 4)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 129, 1000, 4000])
async def test_tokens_are_those_of_one_colocated_worker(client: AsyncClient, expected: Expected, tokens: int) -> None:
    answer = await ask(client, prompt_of(tokens))
    assert answer.same_as(await expected(prompt_of(tokens)))
    assert bool(answer.timings.prefill_worker) == (tokens > 1)
    assert answer.timings.kv_bytes_before_prefill_ended == 0


async def test_sixteen_requests_at_once_are_each_exact(client: AsyncClient, expected: Expected) -> None:
    prompts = [prompt_of(40 * number + 3, seed=number) for number in range(16)]
    answers = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
    oracle = await asyncio.gather(*map(expected, prompts))
    assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_streams_survive_the_loss_of_a_worker(
    cluster: Cluster, client: AsyncClient, expected: Expected, victim: str
) -> None:
    prompts = [prompt_of(900 + number, seed=number) for number in range(8)]
    enough = asyncio.Event()
    asking = [asyncio.create_task(ask(client, prompt, greedy(100), lambda tokens: enough.set())) for prompt in prompts]
    await enough.wait()
    cluster.kill(victim)
    answers = await asyncio.gather(*asking)
    oracle = await asyncio.gather(*(expected(prompt, greedy(100)) for prompt in prompts))
    assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))
