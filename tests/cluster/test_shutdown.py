"""SIGTERM to a router with streams under way, one for each way to ask: they end whole, or by name once time is up."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import SimSettings
from splitserve.core.errors import Unavailable
from splitserve.rpc import convert
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc
from tests.cluster.asking import greedy, prompt_of
from tests.cluster.conftest import Expected
from tests.cluster.events import ErrorEvent, completion, events, token_ids_of
from tests.cluster.processes import ROUTER, Cluster, cluster_of

ENGINE = SimSettings(step_s=0.005, prefill_token_s=0.00005, decode_token_s=0.00001)
PROMPT, TOKENS = prompt_of(100), 300  # 1.5 s
WITHIN_S = 60.0

Hear = Callable[[list[int]], None]
Stream = Callable[["Router", Hear], Coroutine[Any, Any, None]]


class Router:
    """How to reach it, three ways."""

    def __init__(self, cluster: Cluster, client: AsyncClient, channel: grpc.aio.Channel, tokens: int) -> None:
        self.cluster, self.client, self.channel, self.tokens = cluster, client, channel, tokens

    async def ended(self) -> int:
        """Its exit code; fails if it does not end."""
        return await asyncio.to_thread(self.cluster.router.ended)


@asynccontextmanager
async def router_in(directory: Path, drain_timeout_s: float, tokens: int) -> AsyncIterator[Router]:
    config = ROUTER.model_copy(update={"http": "127.0.0.1:0", "drain_timeout_s": drain_timeout_s})
    with cluster_of(directory, 1, 1, ENGINE, config) as cluster:
        async with (
            asyncio.timeout(WITHIN_S),
            AsyncClient(cluster.address, Retries(most=0)) as client,
            grpc.aio.insecure_channel(cluster.address) as channel,
        ):
            yield Router(cluster, client, channel, tokens)


async def _generate(router: Router, hear: Hear) -> None:
    stub: Any = inference_pb2_grpc.InferenceStub(router.channel)  # type: ignore[no-untyped-call]
    ids, sampling = inference_pb2.TokenIds(ids=PROMPT), convert.sampling_to_proto(greedy(router.tokens))
    async for part in stub.Generate(inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling)):
        hear(list(part.token_ids))


async def _shared(router: Router, hear: Hear) -> None:
    async for chunk in router.client.generate(PROMPT, greedy(router.tokens)):
        hear(list(chunk.token_ids))


async def _http(router: Router, hear: Hear) -> None:
    url = f"http://{router.cluster.router.facts['http']}/v1/completions"
    async with (
        aiohttp.ClientSession(raise_for_status=True) as session,
        session.post(url, json=completion(PROMPT, router.tokens)) as answer,
    ):
        async for event in events(answer.content):
            hear(token_ids_of(event))


STREAMS: tuple[Stream, ...] = (_generate, _shared, _http)


class Heard:
    """One stream under way."""

    def __init__(self, router: Router, stream: Stream) -> None:
        self.token_ids: list[int] = []
        self.begun = asyncio.Event()
        self.task = asyncio.create_task(stream(router, self._hear))

    def _hear(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        self.begun.set()


async def under_way(router: Router) -> list[Heard]:
    heard = [Heard(router, stream) for stream in STREAMS for _ in range(4)]
    await asyncio.gather(*(one.begun.wait() for one in heard))
    return heard


async def test_streams_of_every_protocol_end_whole_before_the_router_does(tmp_path: Path, expected: Expected) -> None:
    async with router_in(tmp_path, drain_timeout_s=30.0, tokens=TOKENS) as router:
        heard = await under_way(router)
        router.cluster.router.signal(signal.SIGTERM)
        await asyncio.gather(*(one.task for one in heard))
        assert await router.ended() == 0
    oracle = (await expected(PROMPT, greedy(TOKENS))).token_ids
    assert [tuple(one.token_ids) for one in heard] == [oracle] * len(heard)


async def test_while_it_drains_a_router_takes_nothing_new_by_any_protocol(tmp_path: Path) -> None:
    async with router_in(tmp_path, drain_timeout_s=30.0, tokens=TOKENS) as router:
        heard = await under_way(router)
        router.cluster.router.signal(signal.SIGTERM)
        while "router drains" not in router.cluster.router.log.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        late = await asyncio.gather(*(stream(router, lambda _: None) for stream in STREAMS), return_exceptions=True)
        assert [_code(error) for error in late] == ["UNAVAILABLE"] * len(STREAMS)
        await asyncio.gather(*(one.task for one in heard))


async def test_streams_of_every_protocol_end_by_name_when_the_time_to_drain_is_up(
    tmp_path: Path, expected: Expected
) -> None:
    async with router_in(tmp_path, drain_timeout_s=0.2, tokens=8000) as router:
        heard = await under_way(router)
        router.cluster.router.signal(signal.SIGTERM)
        ends = await asyncio.gather(*(one.task for one in heard), return_exceptions=True)
        assert [_code(error) for error in ends] == ["UNAVAILABLE"] * len(heard)
        assert await router.ended() == 0
    oracle = (await expected(PROMPT, greedy(1000))).token_ids
    for one in heard:
        assert tuple(one.token_ids[:1000]) == oracle[: len(one.token_ids)]


def _code(error: BaseException | None) -> str:
    match error:
        case Unavailable() | ErrorEvent(code="unavailable") | aiohttp.ClientResponseError(status=503):
            return "UNAVAILABLE"
        case grpc.aio.AioRpcError():
            return str(error.code().name)
    return repr(error)
