"""One event stream to one client: begun by its first chunk, so that what fails before has a status of its own.

Nearly every token goes through `put`, which does as little as it can: bytes to the transport, and a look at how much
waits there. Once a client is behind by `BEHIND_BYTES`, `put` refuses and `send` waits for it, so that whoever sends is
held up; not for longer than `stall_s`. One task at a time per prompt.
"""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.http import StreamWriter

from splitserve.core.errors import Cancelled, Overloaded
from splitserve.core.request import Chunk
from splitserve.core.sink import Sink
from splitserve.gateway.answers import NO_USAGE, plus
from splitserve.gateway.events import DONE, Events, error_event

BEHIND_BYTES = 65_536  # uvloop's and asyncio's own high-water mark, at which `drain` begins to wait
_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream:
    def __init__(self, http: web.Request, events: Events, request_id: str, with_usage: bool, stall_s: float) -> None:
        self._http = http
        self._events = events
        self._with_usage = with_usage
        self._stall_s = stall_s
        self._usage = NO_USAGE
        self._writer: StreamWriter | None = None
        self._transport: asyncio.WriteTransport | None = None
        self.response = web.StreamResponse(headers={**_HEADERS, "x-request-id": request_id})

    @property
    def begun(self) -> bool:
        """Whether the client has got a status."""
        return self.response.prepared

    def to(self, prompt: int) -> Sink:
        """What the generation for the prompt of that number sends its chunks to. It raises Cancelled once the client
        has gone, Overloaded if it takes nothing any more."""
        return _Part(self, prompt)

    async def end(self) -> None:
        """After the last chunk."""
        usage = self._events.usage(self._usage) if self._with_usage else b""
        await self._close(usage + DONE)

    async def fail(self, body: bytes) -> None:
        """Says what went wrong, where the stream has begun."""
        await self._close(error_event(body) + DONE)

    def put(self, chunk: Chunk, prompt: int) -> bool:
        """See `Sink`."""
        writer, transport = self._writer, self._transport
        if writer is None or transport is None or transport.is_closing() or chunk.usage is not None:
            return False
        if transport.get_write_buffer_size() > BEHIND_BYTES:
            return False
        _run(writer.write(self._events.of(chunk, prompt), drain=False))
        return True

    async def send(self, chunk: Chunk, prompt: int) -> None:
        """See `Sink`."""
        if chunk.usage is not None:
            self._usage = plus(self._usage, chunk.usage)
        await self._write(self._events.of(chunk, prompt))

    async def _write(self, data: bytes) -> None:
        writer = self._writer or await self._begin()
        transport = self._transport
        try:
            await writer.write(data, drain=False)
            if transport is not None and transport.get_write_buffer_size() > BEHIND_BYTES:
                await self._drain(writer)
        except ConnectionError as error:
            raise Cancelled("the client has gone") from error

    async def _begin(self) -> StreamWriter:
        try:
            writer = await self.response.prepare(self._http)
        except ConnectionError as error:
            raise Cancelled("the client has gone") from error
        assert isinstance(writer, StreamWriter)
        self._writer, self._transport = writer, writer.transport
        return writer

    async def _drain(self, writer: StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await writer.drain()
        except TimeoutError as error:
            if self._transport is not None:
                self._transport.abort()
            raise Overloaded(f"the client has taken nothing for {self._stall_s:g} s", self._stall_s) from error

    async def _close(self, data: bytes) -> None:
        """A client that does not take the end either is cut off."""
        try:
            async with asyncio.timeout(self._stall_s):
                await self._write(data)
                await self.response.write_eof()
        except (TimeoutError, ConnectionError, Cancelled, Overloaded):
            if self._http.transport is not None:
                self._http.transport.abort()


@dataclass(frozen=True, slots=True)
class _Part:
    """One prompt's sink."""

    stream: EventStream
    prompt: int

    def put(self, chunk: Chunk) -> bool:
        return self.stream.put(chunk, self.prompt)

    async def send(self, chunk: Chunk) -> None:
        await self.stream.send(chunk, self.prompt)


def _run(undrained_write: Coroutine[Any, Any, None]) -> None:
    """aiohttp writes in a coroutine, which waits for nothing unless it drains: a task is not needed for it."""
    try:
        undrained_write.send(None)
    except StopIteration:
        return
    raise AssertionError("a write that was not to drain waits")
