"""`splitserve gateway` in front of a router and simulated workers, asked by OpenAI's own package and the standard
library."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import yaml
from openai import AsyncOpenAI, OpenAI

from splitserve.client import AsyncClient
from splitserve.core.config import SimSettings
from splitserve.core.request import Chat, ChatMessage
from splitserve.core.worker import Pool
from splitserve.gateway.config import GatewayConfig
from tests.cluster.asking import WAIT_S, ask, eventually, greedy, settled
from tests.cluster.processes import ROUTER, Cluster, Process, cluster_of

TOLD = SimSettings(
    step_s=0.001, prefill_token_s=0.000005, decode_token_s=0.00001, tool_parser="sim", reasoning_parser="sim"
)
TEXT = "It is a truth universally acknowledged,"
HELLO: Any = [{"role": "user", "content": "Who is Emma?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def cluster(directory: Path) -> Iterator[Cluster]:
    with cluster_of(directory) as started:
        yield started


@pytest.fixture(scope="module")
def gateway(cluster: Cluster, directory: Path) -> Iterator[str]:
    """The gateway's address."""
    process = gateway_of(cluster.address, directory, "gateway")
    try:
        yield str(process.ready()["address"])
    finally:
        process.close()


@pytest.fixture
async def client(gateway: str, cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    """After each test the workers hold nothing."""
    async with AsyncOpenAI(base_url=f"http://{gateway}/v1", api_key="k", max_retries=0) as asking:
        yield asking
    async with AsyncClient(cluster.address) as grpc:
        await settled(grpc, 2)


@pytest.fixture
async def router(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address) as grpc:
        yield grpc


def gateway_of(router: str, directory: Path, name: str, **settings: Any) -> Process:
    config = GatewayConfig(router=router, listen="127.0.0.1:0", model="demo", **settings)
    return Process("gateway", config, directory, name)


async def test_http_and_grpc_give_the_same_text(client: AsyncOpenAI, router: AsyncClient) -> None:
    expected = await ask(router, TEXT, greedy(24))
    asked: Any = {
        "model": "demo",
        "prompt": TEXT,
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = await client.completions.create(**asked)
    parts = [part async for part in await client.completions.create(**asked, stream=True)]
    assert whole.choices[0].text == expected.text
    assert "".join(part.choices[0].text for part in parts) == expected.text
    assert (whole.choices[0].finish_reason, parts[-1].choices[0].finish_reason) == ("length", "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24


async def test_a_chat_streams_with_usage(client: AsyncOpenAI) -> None:
    asked: Any = {"model": "demo", "messages": HELLO, "max_completion_tokens": 12, "seed": 7}
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    whole = await client.chat.completions.create(**asked)
    parts = [part async for part in await client.chat.completions.create(**asked, **options)]
    assert "".join(choice.delta.content or "" for part in parts for choice in part.choices) == (
        whole.choices[0].message.content
    )
    assert parts[-1].usage == whole.usage


async def test_the_sync_client_works(gateway: str) -> None:
    def ask_it() -> str | None:
        with OpenAI(base_url=f"http://{gateway}/v1", api_key="k") as asking:
            answer = asking.chat.completions.create(model="demo", messages=HELLO, max_tokens=4)
            return answer.choices[0].message.content

    assert await asyncio.to_thread(ask_it)


async def test_n_outputs_differ_by_their_seeds_and_are_told_apart(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="demo", prompt=TEXT, max_tokens=8, n=3, seed=1, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.text for choice in answer.choices)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24


async def test_several_prompts_are_answered_each(client: AsyncOpenAI, router: AsyncClient) -> None:
    texts = [(await ask(router, prompt, greedy(6))).text for prompt in (TEXT, "Emma")]
    answer = await client.completions.create(
        model="demo", prompt=[TEXT, "Emma"], max_tokens=6, temperature=0, extra_body={"ignore_eos": True}
    )
    assert [choice.text for choice in answer.choices] == texts


async def test_log_probabilities_spell_the_text(client: AsyncOpenAI) -> None:
    completion = await client.completions.create(model="demo", prompt=TEXT, max_tokens=6, temperature=0, logprobs=2)
    chat = await client.chat.completions.create(
        model="demo", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    assert completion.choices[0].logprobs is not None
    assert "".join(completion.choices[0].logprobs.tokens or ()) == completion.choices[0].text
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert "".join(token.token for token in content) == chat.choices[0].message.content
    assert [len(token.top_logprobs) for token in content] == [2] * len(content)


async def test_a_stop_string_ends_the_text_before_it(client: AsyncOpenAI, router: AsyncClient) -> None:
    text = (await ask(router, TEXT, greedy(16))).text
    stop = text[len(text) // 2 :][:4]
    answer = await client.completions.create(model="demo", prompt=TEXT, max_tokens=16, temperature=0, stop=stop)
    assert (answer.choices[0].finish_reason, answer.choices[0].text) == ("stop", text[: text.index(stop)])


async def test_a_schema_a_tool_and_reasoning_come_in_their_fields(tmp_path: Path) -> None:
    with cluster_of(tmp_path, prefill=0, engine=TOLD) as cluster:
        process = gateway_of(cluster.address, tmp_path, "gateway")
        try:
            address = process.ready()["address"]
            async with AsyncOpenAI(base_url=f"http://{address}/v1", api_key="k") as client:
                await _schema_tool_and_reasoning(client)
        finally:
            process.close()


async def _schema_tool_and_reasoning(client: AsyncOpenAI) -> None:
    schema = WEATHER["function"]["parameters"]
    shaped = await client.chat.completions.create(
        model="demo",
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    assert set(json.loads(shaped.choices[0].message.content or "")) == {"city"}
    assert shaped.choices[0].message.model_dump()["reasoning"]
    asked: Any = {"model": "demo", "messages": HELLO, "tools": [WEATHER], "tool_choice": "required"}
    called = await client.chat.completions.create(**asked)
    async with client.chat.completions.stream(**asked) as stream:
        streamed = await stream.get_final_completion()
    for choice in (called.choices[0], streamed.choices[0]):
        calls: Any = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert calls[0].id
        assert calls[0].function.name == "weather"
        assert set(json.loads(calls[0].function.arguments)) == {"city"}


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"prompt": [2**32]}, openai.BadRequestError, "prompt"),
        ({"logit_bias": {"7": 1000}}, openai.BadRequestError, "logit_bias[7]"),
        ({"extra_body": {"min_p": 3}}, openai.BadRequestError, "min_p"),
        ({"model": "nobody"}, openai.NotFoundError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_routers_refusals_name_openais_fields(
    client: AsyncOpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], param: str | None, stream: bool
) -> None:
    with pytest.raises(error) as refused:
        await client.completions.create(**{"model": "demo", "prompt": TEXT, "stream": stream, **fields})
    assert refused.value.param == param


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_frees_the_workers_blocks(
    client: AsyncOpenAI, router: AsyncClient, stream: bool
) -> None:
    async def runs() -> bool:
        fleet = await router.fleet()
        return fleet.running_requests == 1 and any(status.load.running for status in fleet.workers)

    extra: Any = {"ignore_eos": True}
    asking = asyncio.create_task(_read(client, stream, {"prompt": TEXT, "max_tokens": 8000, "extra_body": extra}))
    await eventually(runs, "a request that runs")
    asking.cancel()
    await asyncio.wait({asking}, timeout=WAIT_S)
    await settled(router, 2)


async def _read(client: AsyncOpenAI, stream: bool, fields: dict[str, Any]) -> None:
    answer: Any = await client.completions.create(model="demo", stream=stream, **fields)
    if stream:
        async for _ in answer:
            pass


async def test_models_and_tokens_are_the_routers(client: AsyncOpenAI, gateway: str, router: AsyncClient) -> None:
    assert [model.id async for model in client.models.list()] == ["demo"]
    assert (await router.model("demo")).name == "demo"
    chat = Chat((ChatMessage("user", "Who is Emma?"),))
    async with aiohttp.ClientSession() as session:
        for body, prompt in (({"prompt": TEXT}, TEXT), ({"messages": HELLO}, chat)):
            async with session.post(f"http://{gateway}/tokenize", json=body) as answer:
                told = await answer.json()
            assert told["tokens"] == list(await router.tokenize(prompt))
            assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 8192)


async def test_metrics_tell_of_routes_and_statuses(client: AsyncOpenAI, gateway: str) -> None:
    await client.completions.create(model="demo", prompt=TEXT, max_tokens=1)
    async with aiohttp.ClientSession() as session, session.get(f"http://{gateway}/metrics") as answer:
        text = await answer.text()
    assert 'splitserve_http_requests_total{code="200",route="/v1/completions"}' in text


async def test_sigterm_lets_streams_end(cluster: Cluster, directory: Path) -> None:
    process = gateway_of(cluster.address, directory, "leaving")
    try:
        async with AsyncOpenAI(base_url=f"http://{process.ready()['address']}/v1", api_key="k") as client:
            stream = await client.completions.create(
                model="demo", prompt=TEXT, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(stream)
            process.signal(signal.SIGTERM)
            finishes = [part.choices[0].finish_reason async for part in stream]
        assert finishes[-1] == "length"
        assert await asyncio.to_thread(process.ended) == 0
    finally:
        process.close()


async def test_a_drain_is_bounded_and_cut_streams_are_told(cluster: Cluster, directory: Path) -> None:
    process = gateway_of(cluster.address, directory, "hurried", drain_timeout_s=0.1)
    try:
        async with AsyncOpenAI(base_url=f"http://{process.ready()['address']}/v1", api_key="k") as client:
            stream = await client.completions.create(
                model="demo", prompt=TEXT, max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(stream)
            process.signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="gateway stops"):
                async for _ in stream:
                    pass
        assert await asyncio.to_thread(process.ended) == 0
    finally:
        process.close()


async def test_without_a_router_health_and_requests_are_503(directory: Path) -> None:
    process = gateway_of("127.0.0.1:9", directory, "alone")
    try:
        address = process.ready()["address"]
        async with aiohttp.ClientSession() as session, session.get(f"http://{address}/health") as answer:
            assert answer.status == 503
        async with AsyncOpenAI(base_url=f"http://{address}/v1", api_key="k", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as refused:
                await client.completions.create(model="demo", prompt=TEXT)
        assert (refused.value.status_code, refused.value.code) == (503, "unavailable")
    finally:
        process.close()


async def test_callers_keys_go_on_to_the_router(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        yaml.safe_dump({"keys": [_entry("user", ["inference"], requests_per_minute=2), _entry("w", ["worker"])]})
    )
    worker_key = tmp_path / "worker.key"
    worker_key.write_text(_key("w"))
    settings = ROUTER.model_copy(update={"api_keys": str(keys)})
    with cluster_of(tmp_path, prefill=0, decode=0, router=settings) as cluster:
        cluster.add("d0", Pool.DECODE, api_key_file=str(worker_key)).ready()
        process = gateway_of(cluster.address, tmp_path, "gateway")
        try:
            await _with_keys(f"http://{process.ready()['address']}/v1")
        finally:
            process.close()


async def _with_keys(base: str) -> None:
    async def ask_with(key: str) -> None:
        async with AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as client:
            await client.completions.create(model="demo", prompt=TEXT, max_tokens=2)

    with pytest.raises(openai.AuthenticationError):
        await ask_with("a-key-that-nobody-has")
    with pytest.raises(openai.PermissionDeniedError):
        await ask_with(_key("w"))
    await ask_with(_key("user"))
    await ask_with(_key("user"))
    with pytest.raises(openai.RateLimitError) as limited:
        await ask_with(_key("user"))
    assert int(limited.value.response.headers["Retry-After"]) >= 1


def _entry(name: str, scopes: list[str], **limits: int) -> dict[str, Any]:
    return {"name": name, "key": _key(name), "scopes": scopes, **limits}


def _key(name: str) -> str:
    return f"{name}-0123456789abcdef"


async def test_health_is_the_fleets(gateway: str, router: AsyncClient) -> None:
    async def healthy() -> bool:
        async with aiohttp.ClientSession() as session, session.get(f"http://{gateway}/health") as answer:
            return answer.status == 200

    await eventually(healthy, "a healthy gateway")
    assert await router.can_serve()
