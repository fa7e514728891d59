"""The server: clients that go or don't read, errors in mid-stream, its end, and the routes beside generation."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest
from prometheus_client import CollectorRegistry

from splitserve import __version__
from splitserve.core.errors import ConfigError, DeadlineExceeded, Overloaded, SplitserveError, Unavailable
from splitserve.core.request import Chunk, GenerateRequest
from splitserve.core.sink import Send
from splitserve.gateway.endpoints import Limits
from splitserve.gateway.serve import HttpServer
from tests.unit.gateway.serving import WITHIN_S, Told, events_of, gateway, last, says, url
from tests.unit.gateway.test_completions import client_of

STREAM: Any = {"model": "demo", "prompt": "x", "stream": True}
LONG = "x" * 50_000


class Endless:
    """Sends, if it says anything, a token and then nothing more until it is cancelled."""

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self.waits = asyncio.Event()
        self.over = asyncio.Event()
        self.error: BaseException | None = None

    async def __call__(self, request: GenerateRequest, send: Send) -> None:
        try:
            if self.speaks:
                await send(Chunk(request.request_id, 0, (1,), "A"))
            self.waits.set()
            await asyncio.Event().wait()
        finally:
            self.over.set()


class Floods:
    """Sends without end."""

    def __init__(self) -> None:
        self.sent = 0
        self.error: SplitserveError | None = None
        self.over = asyncio.Event()

    async def __call__(self, request: GenerateRequest, send: Send) -> None:
        try:
            while True:
                await send(Chunk(request.request_id, self.sent, (1,), LONG))
                self.sent += 1
                await asyncio.sleep(0)
        except SplitserveError as error:
            self.error = error
            raise
        finally:
            self.over.set()


async def within(wait: Any) -> Any:
    async with asyncio.timeout(WITHIN_S):
        return await wait


@asynccontextmanager
async def connected(
    server: HttpServer, body: bytes
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that has sent a completion request and reads nothing yet."""
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    await writer.drain()
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.mark.parametrize("speaks", [True, False])
@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_a_client_that_goes_away_cancels_its_request(speaks: bool, stream: bytes) -> None:
    endless, registry = Endless(speaks), CollectorRegistry()
    backend = Told(endless)
    async with (
        gateway(backend, registry=registry) as server,
        connected(server, b'{"prompt": "x", "request_id": "r", "stream": ' + stream + b"}") as (_, writer),
    ):
        await within(endless.waits.wait())
        writer.transport.abort()
        await within(endless.over.wait())
    assert backend.cancelled == ["r"]
    labels = {"route": "/v1/completions", "code": "499"}
    assert registry.get_sample_value("splitserve_http_requests_total", labels) == 1
    assert registry.get_sample_value("splitserve_http_streams") == 0


async def test_several_prompts_are_cancelled_together() -> None:
    endless = Endless()
    backend = Told(endless)
    async with (
        gateway(backend) as server,
        connected(server, b'{"prompt": ["x", "y"], "request_id": "r", "stream": true}') as (reader, writer),
    ):
        await within(reader.readuntil(b'index":1'))
        writer.transport.abort()
        await within(endless.over.wait())
    assert sorted(backend.cancelled) == ["r-0", "r-1"]


async def test_a_client_that_reads_nothing_holds_up_its_own_stream_alone() -> None:
    floods = Floods()
    backend = Told(floods)
    async with (
        gateway(backend) as server,
        connected(server, b'{"prompt": "x", "stream": true}') as (reader, writer),
    ):
        held_up_at = await _stands_still(floods)
        backend.script = says("A")
        async with client_of(server) as client:
            await client.completions.create(model="demo", prompt="x")
        assert floods.sent == held_up_at
        await within(reader.readexactly(20 * len(LONG)))
        await within(_passes(floods, held_up_at))
        writer.transport.abort()
        await within(floods.over.wait())


async def test_a_client_that_goes_on_reading_nothing_is_cut_off() -> None:
    floods = Floods()
    async with (
        gateway(Told(floods), Limits(stall_s=0.2)) as server,
        connected(server, b'{"prompt": "x", "stream": true}') as (reader, _),
    ):
        await within(floods.over.wait())
        assert isinstance(floods.error, Overloaded)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await within(reader.readexactly(2**40))


async def test_an_error_after_the_first_token_is_the_streams_last_event() -> None:
    async def script(request: GenerateRequest, send: Send) -> None:
        await send(Chunk(request.request_id, 0, (1,), "A"))
        raise DeadlineExceeded("too late")

    registry = CollectorRegistry()
    async with gateway(Told(script), registry=registry) as server, client_of(server) as client:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url(server, "/v1/completions"), json=STREAM) as answer,
        ):
            assert answer.status == 200
            token, error, done = events_of(await answer.read())
        assert b'"text":"A"' in token
        assert error == (
            b'{"error":{"message":"too late","type":"timeout_error","param":null,"code":"deadline_exceeded"}}'
        )
        assert done == b"[DONE]"
        with pytest.raises(openai.APIError, match="too late"):
            async for _ in await client.completions.create(**STREAM):
                pass
    labels = {"route": "/v1/completions", "code": "504"}
    assert registry.get_sample_value("splitserve_http_requests_total", labels) == 2


async def test_draining_lets_streams_end_and_takes_nothing_new() -> None:
    go_on, speaks = asyncio.Event(), asyncio.Event()

    async def script(request: GenerateRequest, send: Send) -> None:
        await send(Chunk(request.request_id, 0, (1,), "A"))
        speaks.set()
        await go_on.wait()
        await send(last())

    async with gateway(Told(script)) as server, aiohttp.ClientSession() as session:
        async with aiohttp.ClientSession() as probe, aiohttp.ClientSession() as client:
            for kept in (probe, client):
                async with kept.get(url(server, "/health")) as answer:
                    assert answer.status == 200
            async with session.post(url(server, "/v1/completions"), json=STREAM) as stream:
                await within(speaks.wait())
                draining = asyncio.create_task(server.drain(WITHIN_S))
                await asyncio.sleep(0)
                async with probe.get(url(server, "/health")) as answer:
                    assert answer.status == 503
                async with client.post(url(server, "/v1/completions"), json={"prompt": "x"}) as answer:
                    assert answer.status == 503
                with pytest.raises(aiohttp.ClientConnectorError):
                    await client.get(url(server, "/health"))
                go_on.set()
                assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        assert await within(draining)


async def test_what_has_not_ended_when_it_stops_is_told_so() -> None:
    endless = Endless()
    async with (
        gateway(Told(endless)) as server,
        aiohttp.ClientSession() as session,
        session.post(url(server, "/v1/completions"), json=STREAM) as stream,
    ):
        await within(endless.waits.wait())
        assert not await server.drain(0.01)
        await server.stop()
        _, error, done = events_of(await stream.read())
    assert b'"code":"unavailable"' in error
    assert done == b"[DONE]"


async def test_health_is_whether_some_worker_takes_requests() -> None:
    backend = Told(says("A"))
    async with gateway(backend) as server, aiohttp.ClientSession() as session:
        for path in ("/health", "/ping"):
            for serves, status in ((True, 200), (False, 503)):
                backend.serves = serves
                async with session.get(url(server, path)) as answer:
                    assert answer.status == status


async def test_models_are_listed_with_their_adapters() -> None:
    backend = Told(says("A"))
    async with gateway(backend) as server, client_of(server) as client:
        models = [model async for model in client.models.list()]
        poet = await client.models.retrieve("poet")
        await client.completions.create(model="poet", prompt="x")
    assert [model.id for model in models] == ["demo", "poet"]
    assert models[0].model_dump()["max_model_len"] == 4096
    assert (poet.id, poet.created, poet.model_dump()["parent"]) == ("poet", 1700000000, "demo")
    assert (backend.requests[0].model, backend.bearers) == ("poet", ["k"])


async def test_tokenize_has_vllms_shape() -> None:
    async with gateway(Told(says("A"))) as server, aiohttp.ClientSession() as session:

        async def told(**body: Any) -> Any:
            async with session.post(url(server, "/tokenize"), json=body) as answer:
                return await answer.json()

        messages = [{"role": "user", "content": "ab"}]
        expected = {"count": 2, "max_model_len": 4096, "tokens": [97, 98], "token_strs": None}
        assert await told(model="demo", prompt="ab") == expected
        assert await told(messages=messages) == expected
        assert (await told(prompt="ab", return_token_strs=True))["token_strs"] == ["a", "b"]
        assert (await told(prompt="ab", add_special_tokens=False))["error"]["param"] == "add_special_tokens"
        assert (await told(model="other", prompt="ab"))["error"]["code"] == "model_not_found"


async def test_without_a_vocabulary_tokens_are_called_by_their_ids() -> None:
    async with gateway(Told(says("A")), texts=False) as server, aiohttp.ClientSession() as session:
        body = {"prompt": "a", "return_token_strs": True}
        async with session.post(url(server, "/tokenize"), json=body) as answer:
            assert (await answer.json())["error"]["param"] == "return_token_strs"


async def test_version_and_metrics_are_told() -> None:
    registry = CollectorRegistry()
    async with gateway(Told(says("A")), registry=registry) as server, aiohttp.ClientSession() as session:
        async with session.get(url(server, "/version")) as answer:
            assert await answer.json() == {"version": __version__}
        async with session.get(url(server, "/nothing/of/the/kind")) as answer:
            assert answer.status == 404
        async with session.get(url(server, "/metrics")) as answer:
            text = await answer.text()
            assert answer.headers["Content-Type"].startswith("text/plain")
    assert 'splitserve_http_requests_total{code="200",route="/version"} 1.0' in text
    assert 'splitserve_http_requests_total{code="404",route="other"} 1.0' in text
    assert 'splitserve_http_request_seconds_count{route="/version"} 1.0' in text


async def test_a_request_id_that_can_be_none_is_replaced() -> None:
    backend = Told(says("A"))
    async with gateway(backend) as server, aiohttp.ClientSession() as session:
        for said in ("r1", "x" * 257):
            headers = {"x-request-id": said}
            async with session.post(url(server, "/v1/completions"), json={"prompt": "x"}, headers=headers) as answer:
                assert answer.headers["x-request-id"] == backend.requests[-1].request_id
    assert backend.requests[0].request_id == "r1"
    assert backend.requests[1].request_id != "x" * 257


async def test_a_taken_port_is_a_configuration_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=address):
            await HttpServer(Told(says("A")), address).start()


async def test_a_body_that_does_not_come_ends_in_408() -> None:
    async with gateway(Told(says("A")), Limits(body_s=0.05)) as server:
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert (await within(reader.readline())).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_unavailable_is_tried_again_by_openais_package() -> None:
    backend = Told(says("A"), error=Unavailable("nobody"))
    async with (
        gateway(backend) as server,
        openai.AsyncOpenAI(base_url=url(server, "/v1"), api_key="k", max_retries=1) as client,
    ):
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(model="demo", prompt="x", extra_headers={"Connection": "close"})
    assert len(backend.requests) == 2


async def _stands_still(floods: Floods) -> int:
    """How much it has sent when turns of the loop move it no further."""
    async with asyncio.timeout(WITHIN_S):
        sent, turns = -1, 0
        while turns < 200:
            turns = turns + 1 if sent == floods.sent and sent > 0 else 0
            sent = floods.sent
            await asyncio.sleep(0)
    return sent


async def _passes(floods: Floods, count: int) -> None:
    while floods.sent <= count:  # noqa: ASYNC110 - it sends at every turn of the loop, and so this looks
        await asyncio.sleep(0)


async def test_what_breaks_in_mid_stream_is_told_in_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    async def script(request: GenerateRequest, send: Send) -> None:
        await send(Chunk(request.request_id, 0, (1,), "A"))
        raise ZeroDivisionError("secret")

    async with (
        gateway(Told(script)) as server,
        aiohttp.ClientSession() as session,
        session.post(url(server, "/v1/completions"), json=STREAM) as answer,
    ):
        _, error, done = events_of(await answer.read())
    assert b'"code":"engine_error"' in error
    assert b"secret" not in error
    assert done == b"[DONE]"
    assert any("request broke the gateway" in record.message for record in caplog.records)


async def test_http_1_0_streams_until_the_connection_closes() -> None:
    async with gateway(Told(says("A", "B"))) as server:
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"prompt": "x", "stream": true}'
        writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        answer = await within(reader.read())
        writer.close()
    head, _, events = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 ")
    assert [len(events_of(events)), events[-14:]] == [3, b"data: [DONE]\n\n"]


async def test_a_connection_is_kept_for_the_next_request() -> None:
    async with gateway(Told(says("A"))) as server:
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"prompt": "x", "stream": true}'
        for _ in range(3):
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            assert (await within(reader.readuntil(b"0\r\n\r\n"))).startswith(b"HTTP/1.1 200 ")
        writer.close()
