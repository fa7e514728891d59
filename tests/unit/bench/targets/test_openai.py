"""An OpenAI-compatible server as a target: one that does as told, and our own gateway; over real HTTP."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp import web

from splitserve.bench.open_loop import run
from splitserve.bench.run import Ending
from splitserve.bench.targets.address import Form, Opened, Options, opened, parse
from splitserve.core.errors import ConfigError, EngineError, InvalidRequest, Overloaded, Unavailable
from splitserve.core.request import Chunk, FinishReason, GenerateRequest, Usage
from splitserve.core.sink import Send
from splitserve.gateway.serve import HttpServer
from splitserve.gateway.tls import ssl_context
from splitserve.workload.requests import Requests
from tests.certificates import Authority
from tests.unit.gateway.serving import Told, gateway

WITHIN_S = 10.0
REQUESTS = Requests(np.zeros(3), np.array([70, 50, 40]), np.array([4, 5, 6]))
IDS = Options(vocabulary=100)

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass
class Server:
    """Its first request, which only finds out whether all is well, it answers as asked; the others by `handler`."""

    handler: Handler
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    address: str = ""
    is_silent: bool = False

    async def models(self, http: web.Request) -> web.Response:
        self.headers.append(dict(http.headers))
        if self.is_silent:
            await asyncio.Event().wait()
        return web.json_response({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})

    async def answer(self, http: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await http.read())
        self.asked.append(body)
        self.headers.append(dict(http.headers))
        self.paths.append(http.path)
        return await (self.handler if len(self.asked) > 1 else as_asked)(http, body)


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Server]:
    server = Server(handler)
    app = web.Application(client_max_size=2**24)
    app.add_routes([web.get("/v1/models", server.models), web.post("/v1/{kind:.+}", server.answer)])
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def target_of(handler: Handler, options: Options = IDS) -> AsyncIterator[tuple[Opened, Server]]:
    async with serving(handler) as server, opened(parse(server.address), options) as target:
        yield target, server


async def stream_of(http: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)
    return response


async def say(response: web.StreamResponse, **event: object) -> None:
    await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")


async def as_asked(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Two tokens an event, and their number so far in each, as vLLM does it."""
    response = await stream_of(http)
    for sent in range(2, body["max_tokens"] + 2, 2):
        tokens = min(sent, body["max_tokens"])
        usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}
        await say(response, choices=[{"index": 0, "text": "ab", "finish_reason": None}], usage=usage)
    await response.write(b"data: [DONE]\n\n")
    return response


async def tokens_of(target: Opened, output_tokens: int = 8) -> int:
    async with asyncio.timeout(WITHIN_S), aclosing(target.ask([1, 2, 3], output_tokens)) as chunks:
        return sum([tokens async for tokens in chunks])


# What is asked -------------------------------------------------------------------------------------------------------
async def test_a_server_is_asked_for_exactly_the_output_wanted() -> None:
    async with target_of(as_asked) as (target, server):
        found = await run(REQUESTS, target.send(REQUESTS))
    assert (target.name, target.vocabulary) == (f"{server.address}/v1", 100)
    assert target.facts == {"kind": "openai", "server": f"{server.address}/v1", "model": "first"}
    assert (found.count(Ending.DONE), found.short) == (3, 0)
    asked = sorted(server.asked[1:], key=lambda body: int(body["max_tokens"]))
    assert [len(body["prompt"]) for body in asked] == [70, 50, 40]
    assert all(0 <= token < 100 for body in asked for token in body["prompt"])
    assert [(body["max_tokens"], body["min_tokens"]) for body in asked] == [(4, 4), (5, 5), (6, 6)]
    for body in asked:
        assert (body["model"], body["ignore_eos"], body["temperature"], body["stream"]) == ("first", True, 0.0, True)
        assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert "return_token_ids" not in asked[0]


async def test_fields_of_ones_own_go_over_the_usual_ones_and_none_leaves_one_out() -> None:
    options = Options(vocabulary=100, model="second", body={"min_tokens": None, "nvext": {"ignore_eos": True}})
    async with target_of(as_asked, options) as (target, server):
        await tokens_of(target)
    assert server.asked[1]["model"] == "second"
    assert server.asked[1]["nvext"] == {"ignore_eos": True}
    assert "min_tokens" not in server.asked[1]


@pytest.mark.parametrize(
    ("form", "path", "where"),
    [(Form.TEXT, "/v1/completions", "prompt"), (Form.CHAT, "/v1/chat/completions", "messages")],
)
async def test_a_server_that_takes_no_ids_is_sent_a_word_for_each(form: Form, path: str, where: str) -> None:
    async with target_of(as_asked, Options(form=form)) as (target, server):
        await run(REQUESTS, target.send(REQUESTS))
    assert set(server.paths) == {path}
    said = [body[where] for body in server.asked[1:]]
    texts = [each if isinstance(each, str) else each[0]["content"] for each in said]
    assert sorted(len(text.split()) for text in texts) == [40, 50, 70]


async def test_the_key_is_shown_and_nothing_is_where_there_is_none() -> None:
    async with target_of(as_asked, Options(vocabulary=100, api_key="secret")) as (target, server):
        await tokens_of(target)
    assert {headers.get("Authorization") for headers in server.headers} == {"Bearer secret"}
    async with target_of(as_asked) as (target, server):
        await tokens_of(target)
    assert {headers.get("Authorization") for headers in server.headers} == {None}


async def test_ids_are_heard_of_a_server_that_says_them() -> None:
    async def with_ids(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await stream_of(http)
        for token in range(3):
            await say(response, choices=[{"text": "a", "token_ids": [token] if body["return_token_ids"] else None}])
        await response.write(b"data: [DONE]\n\n")
        return response

    heard: list[int] = []
    async with target_of(with_ids) as (target, _), aclosing(target.ask([1], 3, heard.extend)) as chunks:
        assert sum([tokens async for tokens in chunks]) == 3
    assert heard == [0, 1, 2]


# What comes back -----------------------------------------------------------------------------------------------------
async def test_a_request_over_its_rate_is_told_in_the_servers_words() -> None:
    async def busy(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "3"})

    async with target_of(busy) as (target, _):
        with pytest.raises(Overloaded, match="HTTP 429: slow down") as raised:
            await tokens_of(target)
    assert raised.value.retry_after_s == 3.0


async def test_an_error_in_the_middle_comes_after_the_tokens_before_it() -> None:
    async def breaks(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await stream_of(http)
        await say(response, choices=[{"text": "a"}])
        await say(response, error={"message": "the engine broke", "code": 500})
        return response

    async with target_of(breaks) as (target, _):
        found = await run(REQUESTS, target.send(REQUESTS))
        with pytest.raises(EngineError, match="the engine broke"):
            await tokens_of(target)
    assert found.tokens.tolist() == [1, 1, 1]
    assert found.count(Ending.FAILED) == 3


async def test_a_stream_without_an_end_has_failed() -> None:
    async def stops(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await stream_of(http)
        await say(response, choices=[{"text": "a"}])
        return response

    async with target_of(stops) as (target, _):
        with pytest.raises(Unavailable, match="without saying that it was the end"):
            await tokens_of(target)


async def test_a_connection_that_breaks_has_failed() -> None:
    async def cuts(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await stream_of(http)
        await say(response, choices=[{"text": "a"}])
        assert http.transport is not None
        http.transport.abort()
        return response

    async with target_of(cuts) as (target, _):
        with pytest.raises((Unavailable, OSError)):
            await tokens_of(target)


@pytest.mark.parametrize("tokens", [0, 1])
async def test_a_stream_left_early_ends_the_request_at_the_server(tokens: int) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def waits(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        began.set()
        try:
            if tokens:
                await say(await stream_of(http), choices=[{"text": "a"}])
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError("an event that nobody sets was set")

    async with target_of(waits) as (target, _):
        chunks = target.ask([1, 2], 8)
        reading = asyncio.ensure_future(anext(chunks))
        async with asyncio.timeout(WITHIN_S):
            await began.wait()
            if tokens:
                assert await reading == 1
            reading.cancel()
            await asyncio.wait({reading})
            await chunks.aclose()
            await cancelled.wait()


async def test_a_hundred_streams_are_open_at_once() -> None:
    open_, all_open = 0, asyncio.Event()

    async def together(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal open_
        open_ += 1
        if open_ == 150:
            all_open.set()
        await all_open.wait()
        return await as_asked(http, body)

    async with target_of(together) as (target, _), asyncio.timeout(WITHIN_S):
        requests = Requests(np.zeros(150), np.full(150, 3), np.full(150, 2))
        found = await run(requests, target.send(requests))
    assert found.count(Ending.DONE) == 150


# Opening -------------------------------------------------------------------------------------------------------------
async def test_a_server_that_is_not_there_is_told_before_the_run() -> None:
    with pytest.raises(Unavailable, match=r"^http://127.0.0.1:1/v1: no server answers at .*/models"):
        async with opened(parse("http://127.0.0.1:1"), IDS):
            pass


async def test_a_silent_server_is_told_before_the_run() -> None:
    async with serving(as_asked) as server:
        server.is_silent = True
        with pytest.raises(Unavailable, match=r"silent for 0.1 s"):
            async with opened(parse(server.address), Options(vocabulary=100, answer_within_s=0.1)):
                pass


async def test_what_is_no_server_of_that_kind_is_told_before_the_run() -> None:
    async with serving(as_asked) as server:
        with pytest.raises(ConfigError, match="404"):
            async with opened(parse(f"{server.address}/elsewhere"), IDS):
                pass


async def test_a_model_that_it_does_not_list_is_told_before_the_run() -> None:
    async with serving(as_asked) as server:
        with pytest.raises(ConfigError, match="no model 'third'; it has first, second"):
            async with opened(parse(server.address), Options(vocabulary=100, model="third")):
                pass


async def test_a_server_that_answers_another_length_is_doubted_aloud() -> None:
    said: list[str] = []
    options = Options(vocabulary=100, say=said.append, body={"max_tokens": 1})
    async with target_of(as_asked, options):
        pass
    assert len(said) == 1
    assert "answered 1 tokens where 2 were asked for" in said[0]


async def test_certificates_without_https_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for https://"):
        async with opened(parse("http://127.0.0.1:1"), Options(vocabulary=100, tls=Authority(tmp_path).client())):
            pass


# Our own -------------------------------------------------------------------------------------------------------------
async def as_told(request: GenerateRequest, send: Send) -> None:
    """Three tokens a chunk."""
    most = request.sampling.max_tokens
    assert most == request.sampling.min_tokens
    assert most is not None
    for index in range(0, most, 3):
        tokens = tuple(range(min(3, most - index)))
        ends = index + 3 >= most
        reason, usage = (FinishReason.LENGTH, Usage(len(request.prompt), most)) if ends else (None, None)  # type: ignore[arg-type]
        await send(Chunk(request.request_id, index, tokens, "ab", finish_reason=reason, usage=usage))


async def test_our_gateway_says_how_many_tokens_each_event_has() -> None:
    backend = Told(as_told)
    async with gateway(backend) as server, opened(parse(f"http://{server.address}"), IDS) as target:
        assert target.facts["model"] == "demo"
        async with aclosing(target.ask([1, 2, 3], 8)) as chunks:
            counts = [tokens async for tokens in chunks]
        heard: list[int] = []
        async with aclosing(target.ask([1, 2, 3], 8, heard.extend)) as chunks:
            assert sum([tokens async for tokens in chunks]) == 8
    assert sum(counts) == 8
    assert heard == [0, 1, 2, 0, 1, 2, 0, 1]
    assert backend.requests[-1].prompt == (1, 2, 3)


async def test_our_gateways_refusals_keep_their_kind() -> None:
    backend = Told(as_told)
    async with gateway(backend) as server, opened(parse(f"http://{server.address}"), IDS) as target:
        backend.error = InvalidRequest("token_ids", "too many")
        with pytest.raises(InvalidRequest, match="too many"):
            await tokens_of(target)


async def test_https_is_asked_by_who_trusts_its_authority(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls = ssl_context(authority.server(mutual=True))
    async with HttpServer(Told(as_told), "127.0.0.1:0", tls) as server:
        known = Options(vocabulary=100, tls=authority.client())
        async with opened(parse(f"https://{server.address}"), known) as target:
            assert await tokens_of(target, 5) == 5
        with pytest.raises(Unavailable, match="certificate"):
            async with opened(parse(f"https://{server.address}"), IDS):
                pass
