"""Requests that share one `GenerateMany` call, as lanes of the load client: nothing but the count of what comes."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from splitserve.rpc.channel import open_channel
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc

WINDOW = 256


class Call:
    """One call and its channel. `serve` raises ConnectionError for a request that fails, or if the call breaks."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._outbox: asyncio.Queue[inference_pb2.ManyRequest] = asyncio.Queue()
        self._open: dict[int, _Open] = {}
        stub = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._call: Any = stub.GenerateMany(self._outgoing())
        self._reading = asyncio.create_task(self._read())

    async def serve(self, number: int, request: inference_pb2.GenerateRequest, on_first: Any) -> tuple[float, int, int]:
        """When the first response came, on the monotonic clock; tokens; responses."""
        one = self._open[number] = _Open(on_first)
        start = inference_pb2.ManyStart(request=request, window=WINDOW)
        self._outbox.put_nowait(inference_pb2.ManyRequest(number=number, start=start))
        try:
            tokens = await one.done
        finally:
            del self._open[number]
        return one.first_at, tokens, one.responses

    def close(self) -> None:
        self._reading.cancel()
        self._call.cancel()

    async def _outgoing(self) -> AsyncIterator[inference_pb2.ManyRequest]:
        while True:
            yield await self._outbox.get()

    async def _read(self) -> None:
        try:
            async for message in self._call:
                for event in message.events:
                    self._take(event)
        except (grpc.RpcError, asyncio.CancelledError) as error:
            for one in self._open.values():
                one.fail(f"the router ended the call: {error}")

    def _take(self, event: inference_pb2.ManyEvent) -> None:
        one = self._open.get(event.number)
        if one is None:
            return
        if event.HasField("error"):
            one.fail(event.error.message)
            return
        one.take(event)
        if one.responses % (WINDOW // 2) == 0:
            self._outbox.put_nowait(inference_pb2.ManyRequest(number=event.number, more=WINDOW // 2))


class _Open:
    def __init__(self, on_first: Any) -> None:
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.first_at = 0.0
        self.responses = 0
        self._on_first = on_first

    def take(self, event: inference_pb2.ManyEvent) -> None:
        if not self.responses:
            self.first_at = time.monotonic()
            self._on_first()
        self.responses += 1
        if event.end and not self.done.done():
            self.done.set_result(event.response.usage.output_tokens)

    def fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(reason))
