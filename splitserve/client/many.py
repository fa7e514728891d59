"""All requests of one asynchronous client on as many calls as it has routers: `GenerateMany`'s other end.

A message a token costs either side ten times what the token does. One reader task a call sorts what comes by request;
each request's consumer says when it has read, so one that reads slowly stops itself alone. Used on one event loop.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc

from splitserve.core.errors import Cancelled, SplitserveError, Unavailable
from splitserve.core.request import Chunk
from splitserve.rpc import convert
from splitserve.rpc.gen import inference_pb2
from splitserve.rpc.status import from_rpc_error, from_status

WINDOW = 256  # responses that may come before their reader asks for more
AT_ONCE = 32  # events whose readers run before all else has its turn: a message may have hundreds


@dataclass(slots=True)
class _Open:
    """One request: what came and is not read, and who waits for it."""

    events: deque[inference_pb2.ManyEvent | SplitserveError] = field(default_factory=deque)
    reader: asyncio.Future[None] | None = None

    def put(self, event: inference_pb2.ManyEvent | SplitserveError) -> None:
        self.events.append(event)
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)

    async def take(self) -> inference_pb2.ManyEvent | SplitserveError:
        if not self.events:
            self.reader = asyncio.get_running_loop().create_future()
            await self.reader
        return self.events.popleft()


class Shared:
    """As many calls as there are routers, each begun when it is needed. `stub` is of an InferenceStub; `routers` says
    how many there are now."""

    def __init__(self, stub: Any, routers: Callable[[], int]) -> None:
        self._stub = stub
        self._routers = routers
        self._calls: list[_Call] = []

    async def stream(self, message: inference_pb2.GenerateRequest, api_key: str = "") -> AsyncGenerator[Chunk, None]:
        """The request's chunks. Raises a SplitserveError; closing the iterator cancels the request."""
        call = self._least_used()
        try:
            async with aclosing(call.stream(message, api_key)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except Unavailable:
            self._retire(call)  # a router that goes away: the next try is another one's
            raise

    async def close(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            await call.close()

    def _least_used(self) -> "_Call":
        self._calls = [call for call in self._calls if not call.is_over]
        if len(self._calls) < self._routers():
            self._calls.append(_Call(self._stub))
        call = min(self._calls, key=len)
        self._calls.remove(call)  # in turn among equals
        self._calls.append(call)
        return call

    def _retire(self, call: "_Call") -> None:
        """It gets no new request, and ends with those that it has."""
        if call in self._calls:
            self._calls.remove(call)
        call.end_when_idle()


class _Call:
    def __init__(self, stub: Any) -> None:
        self._numbers = 0
        self._open: dict[int, _Open] = {}
        self._outbox: asyncio.Queue[inference_pb2.ManyRequest | None] = asyncio.Queue()
        self._retired = False
        self._call = stub.GenerateMany(self._outgoing())
        self._reading = asyncio.create_task(self._read(), name="read what many requests get")

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_over(self) -> bool:
        return self._reading.done()

    async def stream(self, message: inference_pb2.GenerateRequest, api_key: str) -> AsyncGenerator[Chunk, None]:
        self._numbers += 1
        number, open_ = self._numbers, _Open()
        self._open[number] = open_
        start = inference_pb2.ManyStart(request=message, window=WINDOW, api_key=api_key)
        self._say(inference_pb2.ManyRequest(number=number, start=start))
        ended, read = False, 0
        try:
            while not ended:
                event = await open_.take()
                ended = not isinstance(event, inference_pb2.ManyEvent) or event.end
                yield _chunk(event)
                read += 1
                if read % (WINDOW // 2) == 0:
                    self._say(inference_pb2.ManyRequest(number=number, more=WINDOW // 2))
        finally:
            del self._open[number]
            if not ended:
                self._say(inference_pb2.ManyRequest(number=number, cancel=True))
            if self._retired:
                self.end_when_idle()

    def end_when_idle(self) -> None:
        self._retired = True
        if not self._open:
            self._outbox.put_nowait(None)

    async def close(self) -> None:
        """Cancels what still runs."""
        self._call.cancel()
        self._reading.cancel()
        await asyncio.wait({self._reading})

    def _say(self, message: inference_pb2.ManyRequest) -> None:
        self._outbox.put_nowait(message)

    async def _outgoing(self) -> AsyncIterator[inference_pb2.ManyRequest]:
        while (message := await self._outbox.get()) is not None:
            yield message

    async def _read(self) -> None:
        reason: SplitserveError = Unavailable("the router ended the call; send the request again")
        try:
            async for response in self._call:
                for position, event in enumerate(response.events, 1):
                    if (open_ := self._open.get(event.number)) is not None:
                        open_.put(event)
                    if position % AT_ONCE == 0:
                        await asyncio.sleep(0)
        except grpc.RpcError as error:
            reason = from_rpc_error(error)
        except asyncio.CancelledError:
            reason = Cancelled("the client was closed, or the router ended the call")
        for open_ in self._open.values():
            open_.put(reason)


def _chunk(event: inference_pb2.ManyEvent | SplitserveError) -> Chunk:
    """Raises what the event says is wrong."""
    if not isinstance(event, inference_pb2.ManyEvent):
        raise event
    if event.HasField("error"):
        raise from_status(event.error)
    return convert.chunk_from_proto(event.response)
