"""What both clients ask beside generating: tokens, models, whether a router can serve, and with whose key."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from splitserve.client import AsyncClient, Client
from splitserve.core.errors import ModelNotFound
from splitserve.core.request import Chat, ChatMessage
from splitserve.core.worker import Pool
from splitserve.router.serve import Router
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc
from tests.unit.router.scripted import WITHIN_S
from tests.unit.router.wired import WiredWorker, router

CHAT = Chat((ChatMessage("user", "hi"),))


class Doorman(inference_pb2_grpc.InferenceServicer):
    """Notes the keys that it is shown."""

    def __init__(self) -> None:
        self.keys: list[object] = []

    async def Tokenize(self, message: object, context: grpc.aio.ServicerContext) -> inference_pb2.TokenizeResponse:
        self._note(context)
        return inference_pb2.TokenizeResponse(token_ids=[1])

    async def ListModels(self, message: object, context: grpc.aio.ServicerContext) -> inference_pb2.ListModelsResponse:
        self._note(context)
        return inference_pb2.ListModelsResponse()

    async def GetModel(self, message: object, context: grpc.aio.ServicerContext) -> inference_pb2.Model:
        self._note(context)
        return inference_pb2.Model()

    def _note(self, context: grpc.aio.ServicerContext) -> None:
        self.keys.append(dict(context.invocation_metadata()).get("authorization"))


@pytest.fixture
async def serving() -> AsyncIterator[Router]:
    async with router() as started, WiredWorker(started.address, "d0", Pool.DECODE) as worker:
        await worker.told("peers")
        yield started


async def test_both_clients_are_told_the_same(serving: Router) -> None:
    def ask() -> tuple[object, ...]:
        with Client(serving.address) as client:
            models = client.models()
            return (
                models,
                client.model(models[0].name),
                client.tokenize("hi"),
                client.tokenize(CHAT),
                client.can_serve(),
            )

    async with AsyncClient(serving.address) as client:
        async with asyncio.timeout(WITHIN_S):
            while not await client.can_serve():  # noqa: ASYNC110 - the router looks at its workers by the clock
                await asyncio.sleep(0.01)
        models = await client.models()
        told = (
            models,
            await client.model(models[0].name),
            await client.tokenize("hi"),
            await client.tokenize(CHAT),
            True,
        )
        with pytest.raises(ModelNotFound):
            await client.model("other")
    assert told[1] == models[0]
    assert told[2]
    assert await asyncio.to_thread(ask) == told


async def test_without_workers_or_a_router_nothing_can_be_served() -> None:
    async with router() as started, AsyncClient(started.address) as client:
        assert not await client.can_serve()
    async with AsyncClient("127.0.0.1:9") as client:
        assert not await client.can_serve()


async def test_a_key_for_one_call_is_shown_with_it_alone() -> None:
    server, doorman = grpc.aio.server(), Doorman()
    inference_pb2_grpc.add_InferenceServicer_to_server(doorman, server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with AsyncClient(address) as client:
        for bearer in ("mine", ""):
            await client.tokenize("x", bearer=bearer)
            await client.models(bearer)
            await client.model("m", bearer)
    await server.stop(0)
    assert doorman.keys == ["Bearer mine"] * 3 + [None] * 3
