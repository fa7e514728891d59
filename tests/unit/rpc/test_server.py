"""What every server of ours does before it serves anything."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from splitserve.core.errors import ConfigError
from splitserve.rpc.channel import open_channel
from splitserve.rpc.server import Server

SERVICE = "splitserve.v1.Inference"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server("127.0.0.1:0", 1, [SERVICE])
    await server.start()
    yield server
    await server.stop(0)


async def health_of(server: Server, service: str) -> int:
    async with open_channel(server.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)


async def test_port_0_takes_a_free_port_and_says_which(server: Server) -> None:
    assert int(server.address.rpartition(":")[2]) > 0


async def test_a_port_in_use_is_an_error_that_names_the_address(server: Server) -> None:
    with pytest.raises(ConfigError, match="in use") as raised:
        Server(server.address, 1, [SERVICE])
    assert raised.value.path == server.address


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_follows_what_is_set(server: Server, service: str) -> None:
    assert await health_of(server, service) == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.set_serving(True)
    assert await health_of(server, service) == health_pb2.HealthCheckResponse.SERVING
    await server.set_serving(False)
    assert await health_of(server, service) == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_services(server: Server) -> None:
    async with open_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answers = [answer async for answer in call]
    assert SERVICE in {service.name for service in answers[0].list_services_response.service}


async def test_a_message_above_the_limit_is_refused(server: Server) -> None:
    async with open_channel(server.address, max_message_mib=4) as channel:
        large = health_pb2.HealthCheckRequest(service="x" * (2 * 1024 * 1024))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health_pb2_grpc.HealthStub(channel).Check(large)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_no_call_of_a_large_burst_is_dropped(server: Server) -> None:
    async with open_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answers = await asyncio.gather(*(stub.Check(health_pb2.HealthCheckRequest()) for _ in range(4000)))
    assert {answer.status for answer in answers} == {health_pb2.HealthCheckResponse.NOT_SERVING}
