"""A healthy cluster of two prefill and two decode workers: exactness, concurrency, cancellation, operations."""

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from splitserve.client import AsyncClient
from splitserve.core.errors import UnknownWorker
from splitserve.core.request import ChatMessage, FinishReason, SamplingParams
from splitserve.core.worker import Pool
from tests.cluster.asking import ask, eventually, greedy, holds, prompt_of, settled, worker_status
from tests.cluster.conftest import Expected
from tests.cluster.processes import Cluster, cluster_of

WORKERS = 4
LENGTHS = (1, 2, 15, 16, 17, 127, 128, 129, 1000, 2048, 2049, 4000)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("serving"), prefill=2, decode=2) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """After each test all memory is free again on every worker."""
    async with AsyncClient(cluster.address) as connected:
        yield connected
        await settled(connected, WORKERS)


@pytest.mark.parametrize("tokens", LENGTHS)
async def test_tokens_and_text_are_those_of_one_colocated_worker(
    client: AsyncClient, expected: Expected, tokens: int
) -> None:
    prompt = prompt_of(tokens)
    answer = await ask(client, prompt)
    assert answer.same_as(await expected(prompt))
    assert bool(answer.timings.prefill_worker) == (tokens > 1)  # of one token there is nothing to move


async def test_another_last_token_gives_another_answer(client: AsyncClient) -> None:
    """The twin of exactness: the simulated engine does look at the prompt."""
    prompt = prompt_of(500)
    assert not (await ask(client, prompt)).same_as(await ask(client, (*prompt[:-1], prompt[-1] + 1)))


async def test_another_first_token_gives_another_answer(client: AsyncClient) -> None:
    """And at KV that came from elsewhere."""
    prompt = prompt_of(500)
    assert not (await ask(client, prompt)).same_as(await ask(client, (prompt[0] + 1, *prompt[1:])))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, seed=7, ignore_eos=True),
        SamplingParams(
            max_tokens=24, temperature=0, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.3
        ),
        SamplingParams(max_tokens=24, min_tokens=20, temperature=0, logprobs=3),
        SamplingParams(max_tokens=64, temperature=0, stop=("e",), ignore_eos=True),
    ],
)
async def test_sampling_parameters_mean_the_same_as_on_one_worker(
    client: AsyncClient, expected: Expected, sampling: SamplingParams
) -> None:
    prompt = prompt_of(300)
    assert (await ask(client, prompt, sampling)).same_as(await expected(prompt, sampling))


async def test_a_stop_string_ends_the_text_before_it(client: AsyncClient) -> None:
    answer = await ask(
        client, prompt_of(60), SamplingParams(max_tokens=200, temperature=0, stop=("e",), ignore_eos=True)
    )
    assert answer.last.finish_reason is FinishReason.STOP
    assert "e" not in answer.text


async def test_sixty_four_requests_at_once_are_each_exact(client: AsyncClient, expected: Expected) -> None:
    prompts = [prompt_of(1 + 37 * number % 900, seed=number) for number in range(64)]
    answers = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
    oracle = await asyncio.gather(*map(expected, prompts))
    assert [answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True)] == [True] * 64
    assert {answer.timings.decode_worker for answer in answers} == {"decode-0", "decode-1"}
    assert {answer.timings.prefill_worker for answer in answers} >= {"prefill-0", "prefill-1"}


async def test_requests_that_share_a_prefix_are_each_exact(client: AsyncClient, expected: Expected) -> None:
    shared = prompt_of(640)
    prompts = [shared + prompt_of(1 + 17 * number, seed=number) for number in range(8)]
    answers = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
    oracle = await asyncio.gather(*map(expected, prompts))
    assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))


async def test_text_and_chat_messages_are_tokenised_by_the_router(client: AsyncClient) -> None:
    text = await ask(client, "It is a truth universally acknowledged,")
    messages = [chunk async for chunk in client.generate([ChatMessage("user", "Who is Emma?")], greedy(4))]
    assert text.last.usage is not None
    assert messages[-1].usage is not None
    assert 1 < text.last.usage.prompt_tokens < 40
    assert sum(len(chunk.token_ids) for chunk in messages) == 4


async def test_the_last_message_tells_where_the_time_went(client: AsyncClient) -> None:
    answer = await ask(client, prompt_of(2000))
    timings = answer.timings
    assert timings.prefill_worker.startswith("prefill-")
    assert timings.decode_worker.startswith("decode-")
    assert timings.attempts == 1
    assert 0 < timings.kv_bytes_before_prefill_ended <= timings.kv_bytes
    assert 0 <= timings.queue_s <= timings.ttft_s
    assert timings.tpot_s > 0


@pytest.mark.parametrize("tokens_seen", [0, 1, 5])
async def test_a_client_that_goes_away_frees_its_blocks_on_both_sides(client: AsyncClient, tokens_seen: int) -> None:
    """The fixture counts the blocks."""
    enough = asyncio.Event()
    asking = asyncio.create_task(
        ask(client, prompt_of(3000), greedy(2000), lambda tokens: enough.set() if tokens >= tokens_seen else None)
    )
    await (enough.wait() if tokens_seen else eventually(lambda: _running(client), "a request that runs"))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def _running(client: AsyncClient) -> bool:
    fleet = await client.fleet()
    return fleet.running_requests + fleet.waiting_requests > 0


async def test_many_clients_that_go_away_at_once_leave_nothing_behind(client: AsyncClient, expected: Expected) -> None:
    async def first_tokens(number: int) -> None:
        async for chunk in client.generate(prompt_of(200 + 40 * number, seed=number), greedy(500)):
            if chunk.index >= number % 7:
                return

    staying = asyncio.ensure_future(ask(client, prompt_of(700)))
    await asyncio.gather(*(first_tokens(number) for number in range(24)))
    assert (await staying).same_as(await expected(prompt_of(700)))


async def test_a_workers_pool_changes_while_it_serves(client: AsyncClient, expected: Expected) -> None:
    before = asyncio.gather(*(ask(client, prompt_of(400, seed=n), greedy(100)) for n in range(8)))
    await holds(client, "decode-1", lambda status: status.decodes > 0)
    try:
        moved = await client.set_pool("decode-1", Pool.PREFILL)
        assert moved.pool is Pool.PREFILL
        after = await asyncio.gather(*(ask(client, prompt_of(400, seed=n), greedy(100)) for n in range(8)))
    finally:
        await client.set_pool("decode-1", Pool.DECODE)
    answers = [*await before, *after]
    oracle = await asyncio.gather(*(expected(prompt_of(400, seed=n), greedy(100)) for n in range(8)))
    assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle * 2, strict=True))
    assert {answer.timings.decode_worker for answer in after} == {"decode-0"}


async def test_a_drain_under_load_loses_nothing(cluster: Cluster, client: AsyncClient, expected: Expected) -> None:
    load = asyncio.gather(*(ask(client, prompt_of(300, seed=n), greedy(150)) for n in range(16)))
    await holds(client, "decode-0", lambda status: status.decodes > 0)
    await client.drain("decode-0")
    assert cluster.workers["decode-0"].ended() == 0
    oracle = await asyncio.gather(*(expected(prompt_of(300, seed=n), greedy(150)) for n in range(16)))
    assert all(answer.same_as(whole) for answer, whole in zip(await load, oracle, strict=True))
    assert await worker_status(client, "decode-0") is None
    cluster.restart("decode-0").ready()


async def test_an_operator_who_names_no_worker_hears_which_there_are(client: AsyncClient) -> None:
    with pytest.raises(UnknownWorker, match=r"there are: .*decode-0"):
        await client.drain("nobody")
    with pytest.raises(UnknownWorker, match=r"there are: .*decode-0"):
        await client.set_pool("nobody", Pool.DECODE)


async def test_health_is_serving_for_the_whole_and_for_each_service(cluster: Cluster, client: AsyncClient) -> None:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "splitserve.v1.Inference", "splitserve.v1.Admin", "splitserve.v1.Fleet"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services(cluster: Cluster, client: AsyncClient) -> None:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([request])):
            names = {service.name for service in answer.list_services_response.service}
    assert names >= {"splitserve.v1.Inference", "splitserve.v1.Admin", "splitserve.v1.Fleet", "grpc.health.v1.Health"}


async def test_every_process_has_metrics(cluster: Cluster, client: AsyncClient) -> None:
    await ask(client, prompt_of(50))
    for process in (cluster.router, *cluster.workers.values()):
        page = await asyncio.to_thread(_page, f"http://{process.facts['metrics']}/metrics")
        assert "splitserve_" in page


def _page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())
