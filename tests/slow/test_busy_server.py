"""A server whose event loop is busy for longer than gRPC by itself would let calls wait."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.rpc.channel import open_sync_channel
from splitserve.rpc.server import Server

pytestmark = pytest.mark.slow

CALLS = 20
BUSY_S = 33.0  # gRPC cancels calls that nobody took up for 30 s
ANSWER_WITHIN_S = 60.0


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server("127.0.0.1:0", 1, [])
    await server.start()
    yield server
    await server.stop(0)


async def test_calls_that_a_busy_loop_has_not_taken_up_for_long_are_answered(server: Server) -> None:
    with open_sync_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        calls = [check.future(health_pb2.HealthCheckRequest()) for _ in range(CALLS)]
        time.sleep(BUSY_S)  # noqa: ASYNC251 - this is what keeps the loop busy
        answers = [await asyncio.to_thread(call.result, ANSWER_WITHIN_S) for call in calls]
    assert {answer.status for answer in answers} == {health_pb2.HealthCheckResponse.NOT_SERVING}
