"""Both clients against a router with a worker that does as told."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc.status_pb2 import Status

from splitserve.client import AsyncClient, Client, Drained, Retries
from splitserve.client.calls import request_of
from splitserve.core.errors import EngineError, InvalidRequest, ModelNotFound, Unavailable
from splitserve.core.request import ChatMessage, Chunk, FinishReason, SamplingParams
from splitserve.core.worker import Outcome, Pool
from splitserve.router.serve import Router
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc
from tests.unit.router.scripted import WITHIN_S
from tests.unit.router.wired import WiredWorker, router

QUICK = Retries(most=3, first_pause_s=0.001)


@pytest.fixture
async def serving() -> AsyncIterator[Router]:
    async with router() as started:
        yield started


class Flaky(inference_pb2_grpc.InferenceServicer):
    """Answers UNAVAILABLE, after some tokens or none, so many times; then two tokens."""

    def __init__(self, failures: int, tokens_first: bool) -> None:
        self.calls = 0
        self._failures = failures
        self._tokens_first = tokens_first

    async def Generate(self, message: object, context: grpc.aio.ServicerContext) -> None:
        self.calls += 1
        if self.calls > self._failures or self._tokens_first:
            await context.write(inference_pb2.GenerateResponse(token_ids=[1, 2]))
        if self.calls <= self._failures:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "try again")

    async def GenerateMany(
        self, messages: AsyncIterator[inference_pb2.ManyRequest], context: grpc.aio.ServicerContext
    ) -> None:
        async for message in messages:
            if message.HasField("start"):
                await context.write(inference_pb2.ManyResponse(events=self._events(message.number)))

    def _events(self, number: int) -> list[inference_pb2.ManyEvent]:
        self.calls += 1
        tokens = inference_pb2.GenerateResponse(token_ids=[1, 2])
        fails = self.calls <= self._failures
        said = [inference_pb2.ManyEvent(number=number, response=tokens)] if self._tokens_first or not fails else []
        error = Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="try again")
        last = inference_pb2.ManyEvent(number=number, error=error, end=True)
        if not fails:
            last = inference_pb2.ManyEvent(number=number, response=inference_pb2.GenerateResponse(), end=True)
        return [*said, last]


async def flaky_server(servicer: Flaky) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def tokens_async(address: str) -> list[int]:
    async with AsyncClient(address, QUICK) as client:
        return [token async for chunk in client.generate("x") for token in chunk.token_ids]


async def tokens_sync(address: str) -> list[int]:
    def call() -> list[int]:
        with Client(address, QUICK) as client:
            return [token for chunk in client.generate("x") for token in chunk.token_ids]

    return await asyncio.to_thread(call)


both = pytest.mark.parametrize("tokens", [tokens_async, tokens_sync])


@both
async def test_unavailable_before_the_first_token_is_tried_again(tokens: object) -> None:
    flaky = Flaky(failures=2, tokens_first=False)
    server, address = await flaky_server(flaky)
    assert await tokens(address) == [1, 2]  # type: ignore[operator]
    assert flaky.calls == 3
    await server.stop(0)


@both
async def test_retries_end(tokens: object) -> None:
    flaky = Flaky(failures=99, tokens_first=False)
    server, address = await flaky_server(flaky)
    with pytest.raises(Unavailable, match="try again"):
        await tokens(address)  # type: ignore[operator]
    assert flaky.calls == 1 + QUICK.most
    await server.stop(0)


@both
async def test_after_a_token_nothing_is_tried_again(tokens: object) -> None:
    flaky = Flaky(failures=1, tokens_first=True)
    server, address = await flaky_server(flaky)
    with pytest.raises(Unavailable):
        await tokens(address)  # type: ignore[operator]
    assert flaky.calls == 1
    await server.stop(0)


def test_only_unavailable_is_tried_again_and_pauses_grow() -> None:
    assert Retries().pause_s(EngineError("x"), 0, tokens_seen=False) is None
    pauses = [Retries(most=3, first_pause_s=1.0).pause_s(Unavailable("x"), n, tokens_seen=False) for n in range(4)]
    assert pauses[3] is None
    for pause, middle in zip(pauses[:3], (1.0, 2.0, 4.0), strict=True):
        assert pause is not None
        assert 0.5 * middle <= pause <= 1.5 * middle


async def test_the_sync_client_does_all_that_the_async_one_does(serving: Router) -> None:
    async with WiredWorker(serving.address, "d0", Pool.DECODE) as worker:
        await worker.told("peers")
        with Client(serving.address) as client:
            answer = asyncio.create_task(asyncio.to_thread(_last, client))
            worker.say(await worker.job(), 10, outcome=Outcome(FinishReason.STOP))
            assert (await answer).finish_reason is FinishReason.STOP
            assert [status.worker.name for status in (await asyncio.to_thread(client.fleet)).workers] == ["d0"]
            assert (await asyncio.to_thread(client.set_pool, "d0", Pool.PREFILL)).pool is Pool.PREFILL
            with pytest.raises(InvalidRequest, match="request_id: no request 'r' runs"):
                await asyncio.to_thread(client.migrate, "r", "d0")
            drained = asyncio.create_task(asyncio.to_thread(client.drain, "d0"))
            await worker.told("drain")
            await worker.__aexit__()
            async with asyncio.timeout(WITHIN_S):
                assert await drained == Drained(finished_requests=0, migrated_requests=0)


async def test_errors_are_the_routers_own(serving: Router) -> None:
    async with AsyncClient(serving.address) as client:
        with pytest.raises(ModelNotFound, match="'other'"):
            await anext(client.generate("x", model="other"))
        with pytest.raises(InvalidRequest, match=r"^sampling\.seed"):
            await anext(client.generate("x", SamplingParams(seed=2**64)))


async def test_nobody_there_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:9", Retries(most=0)) as client:
        with pytest.raises(Unavailable):
            await client.fleet()


def test_a_request_takes_text_ids_or_messages() -> None:
    assert request_of("x", None, {}).prompt == "x"
    assert request_of([1, 2], None, {}).prompt == (1, 2)
    assert request_of([ChatMessage("user", "hi")], None, {"priority": 3}).priority == 3


def _last(client: Client) -> Chunk:
    return list(client.generate([5, 6], SamplingParams(max_tokens=4)))[-1]
