"""A client that does not read: over real sockets, with a real router and simulated engines."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from splitserve.client import AsyncClient
from splitserve.core.config import RequestLimits, SimSettings
from splitserve.rpc import convert
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc
from tests.cluster.asking import ask, eventually, greedy, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import ROUTER, Cluster, cluster_of

# What sockets and HTTP/2 windows hold without the router's doing is about 1,500 messages of a token.
TOKENS = 6000
QUICK = SimSettings(step_s=0.0002, prefill_token_s=0.0, decode_token_s=0.0)
LIMITED = ROUTER.model_copy(update={"limits": RequestLimits(client_buffer_tokens=64, client_stall_s=120.0)})
STALLING = ROUTER.model_copy(update={"limits": RequestLimits(client_buffer_tokens=64, client_stall_s=0.5)})
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("slow-client"), 1, 1, QUICK, LIMITED) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address) as connected:
        yield connected
        await settled(connected, 2)


class Unread:
    """A call to Generate, read only when told to."""

    def __init__(self, address: str) -> None:
        # Else the client's HTTP/2 window grows until the whole output fits into it.
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.http2.bdp_probe", 0)])
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> "Unread":
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt_of(40)),
            sampling=convert.sampling_to_proto(greedy(TOKENS)),
            request_id="unread",
        )
        self.call = self._stub.Generate(request)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await self._channel.close()

    async def rest(self, index: int) -> list[int]:
        """What comes from this position of the output on."""
        token_ids: list[int] = []
        async with asyncio.timeout(WITHIN_S):
            async for message in self.call:
                assert message.index == index + len(token_ids), "a token came twice or was left out"
                token_ids.extend(message.token_ids)
        return token_ids


async def _nothing_held(client: AsyncClient) -> bool:
    fleet = await client.fleet()
    return all(each.load.free_blocks == each.worker.total_blocks and not each.decodes for each in fleet.workers)


async def test_a_client_that_does_not_read_holds_no_block_and_gets_every_token_once_it_reads(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    async with Unread(cluster.address) as slow:
        first = await slow.call.read()
        await eventually(lambda: _nothing_held(client), "no block held")
        assert (await client.fleet()).running_requests == 1
        other = await ask(client, prompt_of(50), greedy(200))  # nobody is held up
        assert first.index == 0
        token_ids = (*first.token_ids, *await slow.rest(len(first.token_ids)))
    assert token_ids == (await expected(prompt_of(40), greedy(TOKENS))).token_ids
    assert other.same_as(await expected(prompt_of(50), greedy(200)))


async def test_a_client_that_never_reads_is_ended_and_holds_up_neither_others_nor_the_routers_end(
    tmp_path: Path,
) -> None:
    with cluster_of(tmp_path, 1, 1, QUICK, STALLING) as cluster:
        async with AsyncClient(cluster.address) as client, Unread(cluster.address) as slow:
            first = await slow.call.read()
            await eventually(lambda: _nothing_runs(client), "nothing running")
            await eventually(lambda: _nothing_held(client), "no block held")
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await slow.rest(len(first.token_ids))
            assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await settled(client, 2)
        cluster.router.signal(signal.SIGTERM)
        assert cluster.router.ended() == 0


async def _nothing_runs(client: AsyncClient) -> bool:
    return (await client.fleet()).running_requests == 0
