"""Late binding, memory at its limits, and several routers in front of the same workers."""

import asyncio
from pathlib import Path

from splitserve.client import AsyncClient
from splitserve.core.config import SimSettings
from splitserve.core.fleet import FleetStatus
from splitserve.core.worker import Pool
from tests.cluster.asking import WAIT_S, ask, eventually, greedy, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import ROUTER, Cluster, Process, cluster_of

# 500 tokens of prompt take 0.5 s; a prefill worker takes one such prompt at a time.
SLOW_PREFILL = SimSettings(step_s=0.001, prefill_token_s=0.001, max_num_batched_tokens=64)
# Two prompts of full length fill a worker: half of its blocks are the reserve that keeps two workers from waiting for
# each other.
TIGHT = SimSettings(step_s=0.001, total_blocks=32, max_model_len=256)


async def test_requests_wait_in_the_router_while_decode_blocks_stay_free(tmp_path: Path, expected: Expected) -> None:
    with cluster_of(tmp_path, engine=SLOW_PREFILL) as cluster:
        async with AsyncClient(cluster.address) as client:
            prompts = [prompt_of(500, seed=number) for number in range(6)]
            asking = [asyncio.create_task(ask(client, prompt)) for prompt in prompts]
            fleet = await _waiting(client, 4)
            decode = next(status for status in fleet.workers if status.pool is Pool.DECODE)
            blocks_of_one = -(-501 // decode.worker.kv.block_size)
            assert decode.worker.total_blocks - decode.load.free_blocks <= 2 * blocks_of_one
            answers = await asyncio.gather(*asking)
            oracle = await asyncio.gather(*map(expected, prompts))
            assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))
            await settled(client, 2)


async def test_a_request_that_is_cancelled_while_it_waits_frees_its_place(tmp_path: Path) -> None:
    with cluster_of(tmp_path, engine=SLOW_PREFILL) as cluster:
        async with AsyncClient(cluster.address) as client:
            asking = [asyncio.create_task(ask(client, prompt_of(500, seed=number))) for number in range(5)]
            await _waiting(client, 3)
            for task in asking[1:]:
                task.cancel()
            await asking[0]
            await asyncio.gather(*asking, return_exceptions=True)
            await settled(client, 2)


async def test_a_lower_priority_number_goes_first(tmp_path: Path) -> None:
    with cluster_of(tmp_path, engine=SLOW_PREFILL) as cluster:
        async with AsyncClient(cluster.address) as client:
            order: list[int] = []

            async def ask_with(priority: int) -> None:
                await ask(client, prompt_of(300, seed=priority), greedy(2), priority=priority)
                order.append(priority)

            first = asyncio.create_task(ask_with(-1000))
            await _busy(client)
            late = [asyncio.create_task(ask_with(priority)) for priority in (3, 1, 2)]
            await asyncio.gather(first, *late)
            assert order == [-1000, 1, 2, 3]
            await settled(client, 2)


async def test_two_full_soft_role_workers_never_wait_for_each_other(tmp_path: Path, expected: Expected) -> None:
    """Each is prefill to the other's decode; together they want several times the memory that there is."""
    with cluster_of(tmp_path, prefill=1, decode=1, engine=TIGHT) as cluster:
        async with AsyncClient(cluster.address) as client:
            prompts = [prompt_of(180 + number, seed=number) for number in range(24)]
            streaming = asyncio.Event()
            halves = [
                asyncio.create_task(ask(client, prompt, greedy(40), lambda tokens: streaming.set()))
                for prompt in prompts[:12]
            ]
            await asyncio.wait_for(streaming.wait(), WAIT_S)
            await client.set_pool("prefill-0", Pool.DECODE)
            await client.set_pool("decode-0", Pool.PREFILL)
            halves += [asyncio.create_task(ask(client, prompt, greedy(40))) for prompt in prompts[12:]]
            answers = await asyncio.gather(*halves)
            oracle = await asyncio.gather(*(expected(prompt, greedy(40)) for prompt in prompts))
            assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))
            await settled(client, 2)


async def test_two_routers_share_workers_and_both_serve_exactly(tmp_path: Path, expected: Expected) -> None:
    with cluster_of(tmp_path, prefill=0, decode=0, engine=TIGHT) as cluster:
        second = Process("router", ROUTER, tmp_path, "second")
        try:
            routers = [cluster.address, second.ready()["address"]]
            _add_workers(cluster, routers)
            async with AsyncClient(routers[0]) as one, AsyncClient(routers[1]) as other:
                await settled(one, 2)
                await settled(other, 2)
                prompts = [prompt_of(150 + number, seed=number) for number in range(16)]
                clients = [one, other] * 8
                asking = [ask(client, prompt) for client, prompt in zip(clients, prompts, strict=True)]
                answers = await asyncio.gather(*asking)
                oracle = await asyncio.gather(*map(expected, prompts))
                assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))
                await settled(one, 2)
        finally:
            second.close()


def _add_workers(cluster: Cluster, routers: list[str]) -> None:
    for pool in Pool:
        cluster.add(f"{pool}-0", pool, routers=routers)
    for worker in cluster.workers.values():
        worker.ready()


async def _waiting(client: AsyncClient, requests: int) -> FleetStatus:
    """The fleet once so many requests wait in the router."""
    seen: list[FleetStatus] = []

    async def check() -> bool:
        seen.append(await client.fleet())
        return seen[-1].waiting_requests >= requests

    await eventually(check, f"{requests} requests that wait")
    return seen[-1]


async def _busy(client: AsyncClient) -> None:
    async def check() -> bool:
        return any(status.prefills for status in (await client.fleet()).workers)

    await eventually(check, "a prefill that runs")
