"""The client that loads a router: so many requests at a time, each followed by the next, until there are no more.

    python -m benchmarks.router.load '{"kind": "grpc", "address": "127.0.0.1:50051", ...}'

A process of its own: says `warm` on stdout when the first requests are over, waits for a line on stdin, serves the
rest and prints what it saw as one JSON line. With `hold` it says `held` once every stream has a token and then only
reads until it is ended. Its own CPU is part of the result: a client that is busy all the time measures itself.
"""

import asyncio
import json
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, cast

import uvloop

from benchmarks.router import http2, many
from splitserve.cli.process import end_with_parent
from splitserve.core.request import GenerateRequest, SamplingParams
from splitserve.rpc import convert
from splitserve.rpc.gen import inference_pb2

GENERATE = "/splitserve.v1.Inference/Generate"
STREAMS_PER_CONNECTION = 64  # of gRPC; of HTTP it is one
FIRST_WORD = 300  # below are special tokens of the demonstration model
LIMIT_S = 300.0
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_TAIL_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Load:
    """`warm_requests` come before the measured `requests`. `text_prompt`: words instead of token ids, HTTP only."""

    kind: Literal["http", "grpc", "many"]
    address: str
    concurrent: int
    warm_requests: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    text_prompt: bool = False
    hold: bool = False

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.output_tokens, temperature=0.0, ignore_eos=True)


@dataclass(slots=True)
class Seen:
    """Of the measured requests. `messages`: events of HTTP or messages of gRPC."""

    requests: int = 0
    tokens: int = 0
    messages: int = 0
    wall_s: float = 0.0
    client_cpu_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Served:
    """One request."""

    ttft_s: float
    tokens: int
    messages: int


class Lane(Protocol):
    """Serves one request at a time."""

    async def serve(self, number: int, begun: "Latch") -> Served: ...

    def close(self) -> None: ...


class Latch:
    """Opens when so many streams have had their first token."""

    def __init__(self, missing: int) -> None:
        self._missing = missing
        self.opened = asyncio.Event()

    def count(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self.opened.set()


class HttpLane(asyncio.Protocol):
    """One connection, which it keeps if the server does."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if not self._done.done():
            self._done.set_exception(ConnectionError(f"the router hung up after {self._tail[-300:]!r}"))

    async def serve(self, number: int, begun: Latch) -> Served:
        loop = asyncio.get_running_loop()
        self._done, self._begun = loop.create_future(), begun
        self._events, self._tail, self._first_at, self._head = 0, b"", 0.0, b""
        if self._transport is None:
            host, _, port = self._load.address.rpartition(":")
            await loop.create_connection(lambda: self, host, int(port))
        assert self._transport is not None
        asked_at = time.monotonic()
        self._transport.write(http_request(self._load, number))
        await self._done
        return Served(self._first_at - asked_at, tokens_of(self._tail), self._events)

    def data_received(self, data: bytes) -> None:
        if not self._events:
            self._head += data
            if not self._head.startswith(b"HTTP/1.1 200"):
                self._done.set_exception(ConnectionError(f"the router answered {self._head[:500]!r}"))
                return
            if b"data:" not in self._head:
                return
            self._first_at, data = time.monotonic(), self._head
            self._begun.count()
        self._events += data.count(b"data: ")  # one cut in two by a read is left out: the count is for information
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if self._tail.endswith(_LAST_CHUNK):
            self._done.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class ManyLane:
    """One request at a time on a call that others share."""

    def __init__(self, load: Load, call: many.Call) -> None:
        self._load = load
        self._call = call

    async def serve(self, number: int, begun: Latch) -> Served:
        asked_at = time.monotonic()
        first_at, tokens, responses = await self._call.serve(number, grpc_message(self._load, number), begun.count)
        return Served(first_at - asked_at, tokens, responses)

    def close(self) -> None:
        self._call.close()


class GrpcLane:
    """One call at a time on a connection that others share."""

    def __init__(self, load: Load, connection: http2.Connection) -> None:
        self._load = load
        self._connection = connection
        self._done: asyncio.Future[None] | None = None

    async def serve(self, number: int, begun: Latch) -> Served:
        self._done, self._begun = asyncio.get_running_loop().create_future(), begun
        self._messages, self._last, self._first_at = 0, b"", 0.0
        asked_at = time.monotonic()
        self._connection.call(GENERATE, grpc_request(self._load, number), self._on_message, self._on_end)
        await self._done
        return Served(self._first_at - asked_at, self._output_tokens(), self._messages)

    def lost(self, reason: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(reason))

    def close(self) -> None:
        self._connection.close()

    def _on_message(self, message: bytes) -> None:
        if not self._messages:
            self._first_at = time.monotonic()
            self._begun.count()
        self._messages += 1
        self._last = message

    def _on_end(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _output_tokens(self) -> int:
        last = inference_pb2.GenerateResponse.FromString(self._last)
        if not last.HasField("usage"):
            raise ConnectionError("the router ended a stream early; its log says why")
        return last.usage.output_tokens


def http_request(load: Load, number: int) -> bytes:
    """As a vLLM client asks; the prompt differs from request to request."""
    words = _prompt(load, number)
    body = {
        "model": "demo",
        "prompt": " ".join(f"w{word}" for word in words) if load.text_prompt else words,
        "max_tokens": load.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    encoded = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (load.address.encode(), len(encoded), encoded)
    )


def grpc_request(load: Load, number: int) -> bytes:
    return grpc_message(load, number).SerializeToString()


def grpc_message(load: Load, number: int) -> inference_pb2.GenerateRequest:
    return convert.request_to_proto(GenerateRequest(prompt=tuple(_prompt(load, number)), sampling=load.sampling))


def tokens_of(tail: bytes) -> int:
    """What the usage at the end of an event stream says. Raises ConnectionError without one."""
    said = _USAGE.findall(tail)
    if not said:
        raise ConnectionError(f"a stream ended without usage: {tail[-300:]!r}")
    return int(said[-1])


def _prompt(load: Load, number: int) -> list[int]:
    """No two alike, and of tokens that the demonstration model has."""
    first = FIRST_WORD + number % 1000
    return [first, FIRST_WORD + number // 1000 % 1000, *range(FIRST_WORD, FIRST_WORD + load.prompt_tokens - 2)]


async def run(load: Load) -> None:
    lanes = await lanes_of(load)
    with ExitStack() as closing:
        for lane in lanes:
            closing.callback(lane.close)
        if load.hold:
            await _hold(load, lanes)
            return
        await serve(load, lanes, iter(range(load.warm_requests)))
        await _said("warm")
        cpu_s, began = _cpu_s(), time.monotonic()
        numbers = iter(range(load.warm_requests, load.warm_requests + load.requests))
        served = await serve(load, lanes, numbers)
        seen = Seen(
            requests=len(served),
            tokens=sum(one.tokens for one in served),
            messages=sum(one.messages for one in served),
            wall_s=time.monotonic() - began,
            client_cpu_s=_cpu_s() - cpu_s,
            ttft_s=[one.ttft_s for one in served],
        )
        print(json.dumps(asdict(seen)), flush=True)


async def lanes_of(load: Load) -> list[Lane]:
    """One for each of the concurrent requests. Raises OSError if nothing listens."""
    if load.kind == "http":
        return [HttpLane(load) for _ in range(load.concurrent)]
    if load.kind == "many":
        call = many.Call(load.address)
        return [ManyLane(load, call) for _ in range(load.concurrent)]
    lanes: list[Lane] = []
    while len(lanes) < load.concurrent:
        lanes += await _shared(load, min(STREAMS_PER_CONNECTION, load.concurrent - len(lanes)))
    return lanes


async def _shared(load: Load, count: int) -> list[GrpcLane]:
    lanes: list[GrpcLane] = []

    def lost(reason: str) -> None:
        for lane in lanes:
            lane.lost(reason)

    host, _, port = load.address.rpartition(":")
    connection = http2.Connection(load.address, lost)
    await asyncio.get_running_loop().create_connection(lambda: connection, host, int(port))
    lanes += [GrpcLane(load, connection) for _ in range(count)]
    return lanes


async def serve(load: Load, lanes: Sequence[Lane], numbers: Iterator[int]) -> list[Served]:
    """Each lane takes the next number when it is done. Raises ConnectionError, in an ExceptionGroup, unless every
    stream is whole."""
    served: list[Served] = []
    unused = Latch(0)

    async def serve_each(lane: Lane) -> None:
        for number in numbers:
            one = await lane.serve(number, unused)
            if one.tokens != load.output_tokens:
                raise ConnectionError(f"{one.tokens} tokens instead of {load.output_tokens}")
            served.append(one)

    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        for lane in lanes:
            tasks.create_task(serve_each(lane))
    return served


async def _hold(load: Load, lanes: Sequence[Lane]) -> None:
    """Opens all streams; ended by a line on stdin."""
    latch = Latch(len(lanes))
    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(lane.serve(number, latch)) for number, lane in enumerate(lanes)]
        async with asyncio.timeout(LIMIT_S):
            await latch.opened.wait()
        await _said("held")
        for stream in streams:
            stream.cancel()


async def _said(word: str) -> None:
    """Says it, and waits for an answer."""
    print(word, flush=True)
    await asyncio.to_thread(sys.stdin.readline)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    said = json.loads(sys.argv[1])
    end_with_parent(int(said.pop("parent")))
    uvloop.run(run(Load(**said)))
