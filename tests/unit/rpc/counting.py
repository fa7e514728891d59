"""Servers that count their calls, and the calls."""

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from splitserve.rpc.guard import bearer
from splitserve.rpc.server import Server

WITHIN_S = 10.0
COUNTED = "splitserve.test.Counted"


class Counting:
    """A server that counts its calls, under a service of its own so that the guard asks about it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.calls = 0
        self.keys: list[str | None] = []
        handlers = {
            "Once": grpc.unary_unary_rpc_method_handler(self._once, None, None),
            "Echo": grpc.stream_stream_rpc_method_handler(self._echo, None, None),
            "Twice": grpc.unary_stream_rpc_method_handler(self._twice, None, None),
        }
        server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(COUNTED, handlers),))

    async def _once(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        self._count(context)
        return request

    async def _twice(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        self._count(context)
        for _ in range(2):
            yield request

    async def _echo(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        self._count(context)
        async for request in requests:
            yield request

    def _count(self, context: grpc.aio.ServicerContext) -> None:
        self.calls += 1
        self.keys.append(bearer(context.invocation_metadata()))


Started = Callable[..., Awaitable[Counting]]
Call = Callable[[grpc.aio.Channel], Awaitable[object]]


async def once(channel: grpc.aio.Channel) -> bytes:
    return bytes(await channel.unary_unary(f"/{COUNTED}/Once")(b"x", timeout=WITHIN_S))


async def twice(channel: grpc.aio.Channel) -> list[bytes]:
    return [answer async for answer in channel.unary_stream(f"/{COUNTED}/Twice")(b"x", timeout=WITHIN_S)]


async def echoed(channel: grpc.aio.Channel) -> bytes:
    async def requests() -> AsyncIterator[bytes]:
        yield b"x"

    answers = [answer async for answer in channel.stream_stream(f"/{COUNTED}/Echo")(requests(), timeout=WITHIN_S)]
    return b"".join(answers)
