"""`GenerateMany`: many requests on one call, and one message for all that came at once.

A gRPC message costs a router about ten times what a token in it does, so callers with many requests share the messages.
Each request is a task of its own and has a window of responses that its caller has yet to read: one that reads slowly
holds up itself alone, and never the call. Used on the router's event loop; the call ends when its caller has ended its
side and every request has ended, and whatever runs ends with the call.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from splitserve.core.errors import InvalidRequest, SplitserveError
from splitserve.core.request import Chunk
from splitserve.router.endpoint import Endpoint
from splitserve.rpc import convert
from splitserve.rpc.gen import inference_pb2
from splitserve.rpc.status import to_status

_MOST_EVENTS = 1024  # in one message
_MOST_BYTES = 2**20
_LARGEST_WINDOW = 4096

Write = Callable[[inference_pb2.ManyResponse], Awaitable[None]]


class _Window:
    """One request's sink. `left`: responses that its caller has room for."""

    def __init__(self, number: int, left: int, put: Callable[[inference_pb2.ManyEvent], None]) -> None:
        self._number = number
        self._left = min(max(1, left), _LARGEST_WINDOW)
        self._put = put
        self._widened = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def put(self, chunk: Chunk) -> bool:
        if not self._left:
            return False
        self._left -= 1
        event = inference_pb2.ManyEvent(number=self._number)
        convert.fill_chunk(event.response, chunk)  # in place: a copy of the message costs more than the rest
        if chunk.usage is not None:
            event.end = True
        self._put(event)
        return True

    async def send(self, chunk: Chunk) -> None:
        while not self.put(chunk):
            self._widened.clear()
            await self._widened.wait()

    def widen(self, by: int) -> None:
        self._left = min(self._left + by, _LARGEST_WINDOW)
        self._widened.set()


class Many:
    """`key` is the API key that came with the call."""

    def __init__(self, endpoint: Endpoint, key: str, write: Write) -> None:
        self._endpoint = endpoint
        self._key = key
        self._write = write
        self._open: dict[int, _Window] = {}
        self._outbox: list[inference_pb2.ManyEvent] = []
        self._news = asyncio.Event()
        self._closing = False

    async def run(self, messages: AsyncIterator[inference_pb2.ManyRequest]) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write_all())
            async with asyncio.TaskGroup() as requests:
                async for message in messages:
                    self._hear(message, requests)
            self._closing = True
            self._news.set()

    def _hear(self, message: inference_pb2.ManyRequest, requests: asyncio.TaskGroup) -> None:
        kind, request = message.WhichOneof("kind"), self._open.get(message.number)
        if kind == "start" and request is None:
            request = self._open[message.number] = _Window(message.number, message.start.window, self._put)
            request.task = requests.create_task(self._serve(message.number, message.start, request))
        elif kind == "start":
            self._put_error(message.number, InvalidRequest("number", f"{message.number} is in use; count upwards"))
        elif kind == "more" and request is not None:
            request.widen(message.more)
        elif kind == "cancel" and request is not None and request.task is not None:
            request.task.cancel()
            del self._open[message.number]

    async def _serve(self, number: int, start: inference_pb2.ManyStart, window: _Window) -> None:
        try:
            request = convert.request_from_proto(start.request)
            await self._endpoint.generate(request, window, start.api_key or self._key)
        except SplitserveError as error:
            self._put_error(number, error)
        finally:
            self._open.pop(number, None)

    def _put_error(self, number: int, error: SplitserveError) -> None:
        self._put(inference_pb2.ManyEvent(number=number, error=to_status(error), end=True))

    def _put(self, event: inference_pb2.ManyEvent) -> None:
        self._outbox.append(event)
        self._news.set()

    async def _write_all(self) -> None:
        """While one message is being written what comes gathers for the next."""
        while not self._closing or self._outbox:
            await self._news.wait()
            self._news.clear()
            while self._outbox:
                count = _fitting(self._outbox)
                events, self._outbox = self._outbox[:count], self._outbox[count:]
                await self._write(inference_pb2.ManyResponse(events=events))


def _fitting(events: Sequence[inference_pb2.ManyEvent]) -> int:
    """How many go into one message: all, as a rule; what has log probabilities may be large."""
    size = 0
    for count, event in enumerate(events[:_MOST_EVENTS]):
        size += event.ByteSize()
        if size > _MOST_BYTES and count:
            return count
    return min(len(events), _MOST_EVENTS)
