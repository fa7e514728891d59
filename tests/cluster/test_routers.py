"""Two routers on one fleet: one may die and come back with no state, and the other goes on."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import SimSettings
from splitserve.core.errors import Unavailable
from splitserve.core.request import SamplingParams
from splitserve.core.worker import Pool
from tests.cluster.asking import ask, eventually, greedy, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import KV, ROUTER, Cluster, Process

ENGINE = SimSettings(step_s=0.005, prefill_token_s=0.00005, decode_token_s=0.00001)
PROMPT = prompt_of(200)
LONG = greedy(400)  # 2 s: a router is killed in the middle
SAMPLED = replace(LONG, temperature=0.9, top_p=0.95, seed=11)
CUT_AFTER = 20
ONCE = Retries(most=0)


@dataclass(slots=True)
class Pair:
    """`first` and `second` are router processes of one fleet."""

    cluster: Cluster
    second: Process

    @property
    def first(self) -> Process:
        return self.cluster.router

    @property
    def addresses(self) -> tuple[str, str]:
        return str(self.first.ready()["address"]), str(self.second.ready()["address"])

    def kill_first(self) -> None:
        self.first.signal(signal.SIGKILL)
        self.first.ended()

    def restart_first(self) -> None:
        """At the address that it had, which its workers know."""
        config = self.first.config.model_copy(update={"listen": self.addresses[0]})
        self.first.close()
        self.cluster.router = Process("router", config, self.cluster.directory, "router")
        self.cluster.router.ready()


@pytest.fixture
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("routers")
    cluster = Cluster(directory, ENGINE, ROUTER, KV)
    second = Process("router", ROUTER, directory, "second")
    try:
        made = Pair(cluster, second)
        for pool in Pool:
            cluster.add(f"{pool}-0", pool, routers=list(made.addresses))
        for worker in cluster.workers.values():
            worker.ready()
        yield made
    finally:
        second.close()
        cluster.close()


@pytest.fixture
async def other(pair: Pair) -> AsyncIterator[AsyncClient]:
    """A client of the router that stays; in the end nobody holds anything."""
    async with AsyncClient(pair.addresses[1], ONCE) as client:
        await settled(client, 2)
        yield client
        await settled(client, 2)


async def begun(client: AsyncClient, sampling: SamplingParams, seen: asyncio.Event) -> list[int]:
    """The tokens that a client has when its router dies. Fails if the stream ends in another way."""
    token_ids: list[int] = []

    async def read() -> None:
        async with aclosing(client.generate(PROMPT, sampling)) as chunks:
            async for chunk in chunks:
                assert chunk.index == len(token_ids)
                token_ids.extend(chunk.token_ids)
                if len(token_ids) >= CUT_AFTER:
                    seen.set()

    with pytest.raises(Unavailable):
        await read()
    return token_ids


async def cut(pair: Pair, client: AsyncClient, *samplings: SamplingParams) -> list[list[int]]:
    """Streams of the first router, each in the middle of its output when that is killed."""
    seen = [asyncio.Event() for _ in samplings]
    streams = [asyncio.create_task(begun(client, *both)) for both in zip(samplings, seen, strict=True)]
    await asyncio.gather(*(one.wait() for one in seen))
    await asyncio.to_thread(pair.kill_first)
    return list(await asyncio.gather(*streams))


async def test_each_router_serves_the_whole_fleet(pair: Pair, other: AsyncClient, expected: Expected) -> None:
    async with AsyncClient(pair.addresses[0], ONCE) as client:
        await settled(client, 2)
        answers = await asyncio.gather(ask(client, PROMPT), ask(other, PROMPT))
        oracle = await expected(PROMPT)
        assert all(answer.same_as(oracle) for answer in answers)
        assert {answer.timings.decode_worker for answer in answers} == {"decode-0"}
        assert (await client.fleet()).router_uuid != (await other.fleet()).router_uuid


async def test_a_stream_whose_router_died_goes_on_at_another_with_what_the_client_has(
    pair: Pair, other: AsyncClient, expected: Expected
) -> None:
    samplings = (LONG, SAMPLED)
    async with AsyncClient(pair.addresses[0], ONCE) as client:
        had = await cut(pair, client, *samplings)
        for sampling, token_ids in zip(samplings, had, strict=True):
            assert CUT_AFTER <= len(token_ids) < 400
            rest = [chunk async for chunk in other.generate(PROMPT, sampling, output=tuple(token_ids))]
            assert rest[0].index == len(token_ids)
            token_ids += [token for chunk in rest for token in chunk.token_ids]
            assert tuple(token_ids) == (await expected(PROMPT, sampling)).token_ids
            assert rest[-1].usage is not None
            assert rest[-1].usage.output_tokens == 400


async def test_blocks_of_a_dead_routers_requests_are_freed(pair: Pair, other: AsyncClient) -> None:
    async with AsyncClient(pair.addresses[0], ONCE) as client:
        await cut(pair, client, *[LONG] * 8)
    await settled(other, 2)


async def test_a_router_comes_back_without_state_is_joined_again_and_serves(
    pair: Pair, other: AsyncClient, expected: Expected
) -> None:
    async with AsyncClient(pair.addresses[0], ONCE) as client:
        before = (await client.fleet()).router_uuid
        await cut(pair, client, LONG)
        await asyncio.to_thread(pair.restart_first)

        async def joined() -> bool:
            try:
                fleet = await client.fleet()
            except Unavailable:  # the channel has not noticed yet
                return False
            return fleet.router_uuid != before and len(fleet.workers) == 2

        await eventually(joined, "the workers join the new router")
        await settled(client, 2)
        assert (await ask(client, PROMPT)).same_as(await expected(PROMPT))


async def test_a_client_of_both_goes_on_with_new_requests_when_one_dies(
    pair: Pair, other: AsyncClient, expected: Expected
) -> None:
    oracle = await expected(PROMPT)
    async with AsyncClient(",".join(pair.addresses)) as client:
        for _ in range(4):
            assert (await ask(client, PROMPT)).same_as(oracle)
        await asyncio.to_thread(pair.kill_first)
        for _ in range(12):
            assert (await ask(client, PROMPT)).same_as(oracle)
        answers = await asyncio.gather(*(ask(client, PROMPT) for _ in range(12)))
        assert all(answer.same_as(oracle) for answer in answers)
