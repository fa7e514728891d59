"""A fake vLLM worker over HTTP, for routers that speak to such: as much of one as they ask for, at hardly any CPU.

    python -m benchmarks.router.fake '{"prefill_s": 0.02, "step_s": 0.01, "colocated": false, "parent": 4711}'

Prefill and decode in one: a request that is not streamed is a prefill, answered whole after `prefill_s`; another's
prompt is there already, unless the worker is colocated. Like an engine it makes one token for every stream in each step
of `step_s`; a stream whose socket is full skips the step. Every event is a chunk of its own, as uvicorn sends it. One
event loop, nothing is shared between processes.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import uvloop

from splitserve.cli.process import end_with_parent

MODEL = "demo"
CONTEXT_TOKENS = 8192
_MOST_HEAD_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Pace:
    """`prefill_s`: until a prompt is read; `step_s`: a decode step, 0 for as fast as sockets take it."""

    prefill_s: float
    step_s: float


class Engine:
    """Steps while it has streams."""

    def __init__(self, pace: Pace, colocated: bool) -> None:
        self.pace = pace
        self.colocated = colocated
        self._streams: set[Connection] = set()
        self._filled = asyncio.Event()

    def add(self, stream: "Connection") -> None:
        self._streams.add(stream)
        self._filled.set()

    def drop(self, stream: "Connection") -> None:
        self._streams.discard(stream)

    async def run(self) -> None:
        while True:
            if not self._streams:
                self._filled.clear()
                await self._filled.wait()
            await asyncio.sleep(self.pace.step_s)
            for stream in tuple(self._streams):
                stream.step()


class Connection(asyncio.Protocol):
    """One router's connection: requests come one after another."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._received = b""
        self._writable = True
        self._left = 0
        self._tokens = 0
        self._prompt_tokens = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def connection_lost(self, error: Exception | None) -> None:
        self._engine.drop(self)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (request := first_request(self._received)) is not None:
            self._received = self._received[request.size :]
            self._answer(request)

    def step(self) -> None:
        """One more token, if the socket takes it."""
        if not self._writable:
            return
        self._left -= 1
        if self._left:
            self._transport.write(_EVENT)
            return
        self._engine.drop(self)
        self._transport.write(_LAST_EVENT + _usage_event(self._prompt_tokens, self._tokens) + _END)

    def _answer(self, request: "Request") -> None:
        if request.path != "/v1/completions":
            self._transport.write(_json(_FACTS.get(request.path, {})))
            return
        said = json.loads(request.body)
        self._tokens = self._left = int(said["max_tokens"])
        self._prompt_tokens = len(said["prompt"])
        prefills = not said.get("stream")
        after = self._prefilled if prefills else self._begin
        read_s = self._engine.pace.prefill_s if prefills or self._engine.colocated else 0.0
        asyncio.get_running_loop().call_later(read_s, after)

    def _prefilled(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(_PREFILLED)

    def _begin(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(_STREAM_HEAD)
            self._engine.add(self)


@dataclass(frozen=True, slots=True)
class Request:
    path: str
    body: bytes
    size: int


def first_request(received: bytes) -> Request | None:
    """The first of what has come, once it is whole."""
    head, found, rest = received.partition(b"\r\n\r\n")
    if not found:
        assert len(received) < _MOST_HEAD_BYTES, "no HTTP request"
        return None
    lines = head.decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    length = int(fields.get("content-length", "0"))
    if len(rest) < length:
        return None
    path = lines[0].split(" ")[1].partition("?")[0]
    return Request(path, rest[:length], len(head) + 4 + length)


def _json(value: Mapping[str, object]) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(text: str, finish_reason: str | None) -> bytes:
    """As vLLM writes it."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason, "stop_reason": None}
    return _chunk(b"data: " + json.dumps({**_COMMON, "choices": [choice]}).encode() + b"\n\n")


def _usage_event(prompt_tokens: int, tokens: int) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + tokens, "completion_tokens": tokens}
    return _chunk(b"data: " + json.dumps({**_COMMON, "choices": [], "usage": usage}).encode() + b"\n\n")


_COMMON = {"id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 1_700_000_000, "model": MODEL}
_EVENT, _LAST_EVENT = _event(" token", None), _event(" token", "length")
_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_PREFILLED = _json(
    {
        **_COMMON,
        "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 100, "total_tokens": 101, "completion_tokens": 1},
        "kv_transfer_params": {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": list(range(7)),
            "remote_engine_id": "0" * 36,
            "remote_request_id": "cmpl-" + "0" * 32,
            "remote_host": "127.0.0.1",
            "remote_port": 5600,
            "tp_size": 1,
        },
    }
)
_FACTS: Mapping[str, Mapping[str, object]] = {
    "/v1/models": {
        "object": "list",
        "data": [{"id": MODEL, "object": "model", "owned_by": "vllm", "root": MODEL, "max_model_len": CONTEXT_TOKENS}],
    },
    "/version": {"version": "0.25.0"},
}


async def serve(pace: Pace, colocated: bool) -> None:
    """Prints its port, then serves until it is killed."""
    engine, loop = Engine(pace, colocated), asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", 0, backlog=4096)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await engine.run()


if __name__ == "__main__":
    said = json.loads(sys.argv[1])
    end_with_parent(int(said.pop("parent")))
    uvloop.run(serve(Pace(said["prefill_s"], said["step_s"]), said["colocated"]))
