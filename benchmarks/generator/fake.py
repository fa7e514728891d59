"""A fake router over gRPC, as much of one as the load generator asks for, at hardly any CPU.

    python -m benchmarks.generator.fake '{"step_s": 0.01, "parent": 4711}'

Like an engine it makes one token for every stream in each step; the tokens of a step are one message, of bytes that are
made once a request. One event loop, nothing is shared between processes. Prints its port.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from splitserve.cli.process import end_with_parent
from splitserve.core.request import Chunk, FinishReason, Usage
from splitserve.rpc import convert
from splitserve.rpc.gen import inference_pb2

_SERVICE = "splitserve.v1.Inference"
_TOKEN, _TEXT = 300, " token"


class Streams:
    """Those of one call. An answer of n tokens is n - 1 times the same event, and a last one."""

    def __init__(self) -> None:
        self._left: dict[int, int] = {}
        self._events: dict[int, bytes] = {}
        self._last: dict[int, bytes] = {}

    def take(self, request: inference_pb2.ManyRequest) -> None:
        number = request.number
        if request.HasField("start"):
            tokens = request.start.request.sampling.max_tokens
            prompt_tokens = len(request.start.request.token_ids.ids)
            last = Chunk(
                "request",
                tokens - 1,
                (_TOKEN,),
                _TEXT,
                finish_reason=FinishReason.LENGTH,
                usage=Usage(prompt_tokens, tokens),
            )
            self._left[number] = tokens
            self._events[number] = _event(number, Chunk("request", 100, (_TOKEN,), _TEXT), end=False)
            self._last[number] = _event(number, last, end=True)
        elif request.HasField("cancel"):
            self._forget(number)

    def step(self) -> bytes:
        """The next token of each, as one ManyResponse: a message of repeated fields is theirs one after another."""
        made = b"".join([self._events[number] for number, left in self._left.items() if left > 1])
        for number in [number for number, left in self._left.items() if left == 1]:
            made += self._last[number]
            self._forget(number)
        for number in self._left:
            self._left[number] -= 1
        return made

    def _forget(self, number: int) -> None:
        for held in (self._left, self._events, self._last):
            held.pop(number, None)


def _event(number: int, chunk: Chunk, end: bool) -> bytes:
    event = inference_pb2.ManyEvent(number=number, response=convert.chunk_to_proto(chunk), end=end)
    return inference_pb2.ManyResponse(events=[event]).SerializeToString()


async def serve(step_s: float) -> None:
    """Until it is killed."""

    async def generate_many(requests: AsyncIterator[Any], context: Any) -> None:
        streams = Streams()
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(_write(streams, context, step_s))
            async for request in requests:
                streams.take(request)
            writing.cancel()

    server = grpc.aio.server()
    method = grpc.stream_stream_rpc_method_handler(generate_many, inference_pb2.ManyRequest.FromString, None)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"GenerateMany": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"port": port}), flush=True)
    await server.wait_for_termination()


async def _write(streams: Streams, context: Any, step_s: float) -> None:
    """On a schedule: a late step does not make the next one late."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due = max(due + step_s, loop.time() - step_s)
        await asyncio.sleep(max(0.0, due - loop.time()))
        if made := streams.step():
            await context.write(made)


if __name__ == "__main__":
    said = json.loads(sys.argv[1])
    end_with_parent(int(said["parent"]))
    uvloop.run(serve(said["step_s"]))
