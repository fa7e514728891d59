"""`/v1/completions`, asked by OpenAI's own package."""

from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from splitserve.core.request import Chunk, FinishReason, GenerateRequest, Logprob, StructuredOutput, Usage
from splitserve.gateway.serve import HttpServer
from tests.unit.gateway.serving import Told, events_of, gateway, last, likely, says, sends, url


def client_of(server: HttpServer) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url(server, "/v1"), api_key="k", max_retries=0)


async def asked_with(**fields: Any) -> GenerateRequest:
    """What the backend is asked for."""
    backend = Told(says("A"))
    async with gateway(backend) as server, client_of(server) as client:
        await client.completions.create(**{"model": "demo", "prompt": "x", **fields})
    return backend.requests[0]


async def test_a_completion_comes_in_one_piece() -> None:
    async with gateway(Told(says("Ah", "oy"))) as server, client_of(server) as client:
        answer = await client.completions.create(model="demo", prompt="x")
    assert (answer.object, answer.model) == ("text_completion", "demo")
    assert answer.id.startswith("cmpl-")
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("Ahoy", "stop")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)


async def test_a_completion_streams_and_ends_with_its_usage() -> None:
    async with gateway(Told(says("Ah", "oy", finish=FinishReason.LENGTH))) as server, client_of(server) as client:
        stream = await client.completions.create(
            model="demo", prompt="x", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert [choice.text for chunk in chunks for choice in chunk.choices] == ["Ah", "oy"]
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None, "length"]
    assert [chunk.usage is not None for chunk in chunks] == [False, False, True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_bytes_of_a_stream_are_exactly_these() -> None:
    backend = Told(sends(Chunk("", 0, (1,), "a"), Chunk("", 1, (2,), 'b"\n'), last(2)))
    asked = {"model": "demo", "prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    async with (
        gateway(backend) as server,
        aiohttp.ClientSession() as session,
        session.post(url(server, "/v1/completions"), json=asked, headers={"x-request-id": "r1"}) as answer,
    ):
        body = await answer.read()
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-request-id"] == "r1"
    created = body.partition(b'"created":')[2].partition(b",")[0]
    about = b'data: {"id":"cmpl-r1","object":"text_completion","created":' + created + b',"model":"demo","choices":['
    assert body == (
        about + b'{"index":0,"text":"a","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        + about + b'{"index":0,"text":"b\\"\\n","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        + about + b'{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n'
        + about + b'],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}}\n\n'
        + b"data: [DONE]\n\n"
    )  # fmt: skip


async def test_every_field_reaches_the_router() -> None:
    request = await asked_with(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        n=2,
        seed=-5,
        stop=["a", "b"],
        logprobs=3,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"7": -100},
        user="someone",
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [9],
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "prompt_logprobs": 1,
            "priority": 3,
            "cache_salt": "pepper",
            "session_id": "s",
            "slo_class": "fast",
            "deadline_s": 5,
            "structured_outputs": {"regex": "a+"},
            "request_id": "mine",
        },
    )
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.n, sampling.seed) == (
        7,
        0.5,
        0.9,
        2,
        -5,
    )
    assert (sampling.stop, sampling.logprobs, sampling.presence_penalty) == (("a", "b"), 3, 0.1)
    assert (sampling.frequency_penalty, dict(sampling.logit_bias), sampling.top_k) == (0.2, {7: -100.0}, 4)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (0.1, 1.2, 2)
    assert (sampling.ignore_eos, sampling.stop_token_ids, sampling.skip_special_tokens) == (True, (9,), False)
    assert (sampling.include_stop, sampling.prompt_logprobs) == (True, 1)
    assert sampling.structured_output == StructuredOutput(regex="a+")
    assert (request.priority, request.cache_salt, request.session_id) == (3, "pepper", "s")
    assert (request.slo_class, request.deadline_s, request.request_id, request.model) == ("fast", 5.0, "mine", "demo")


async def test_unsaid_fields_take_openais_defaults() -> None:
    request = await asked_with(temperature=None, stop="x")
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.stop) == (16, 1.0, ("x",))


@pytest.mark.parametrize(
    ("fields", "structured"),
    [
        ({"guided_json": {"type": "object"}}, StructuredOutput(json_schema='{"type":"object"}')),
        ({"structured_outputs": {"json": '{"a": 1}'}}, StructuredOutput(json_schema='{"a": 1}')),
        ({"guided_choice": ["a", "b"]}, StructuredOutput(choice=("a", "b"))),
        ({"guided_grammar": "root ::= x"}, StructuredOutput(grammar="root ::= x")),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
        ({"response_format": {"type": "text"}}, None),
    ],
)
async def test_structured_output_is_understood_in_each_of_its_spellings(
    fields: dict[str, Any], structured: StructuredOutput | None
) -> None:
    assert (await asked_with(extra_body=fields)).sampling.structured_output == structured


async def test_each_prompt_of_several_has_its_own_choices() -> None:
    async def script(request: GenerateRequest, send: Any) -> None:
        for choice in range(2):
            usage = Usage(1, 2) if choice else None
            text = f"{request.prompt}{choice}"
            await send(Chunk("", 0, (1,), text, choice=choice, finish_reason=FinishReason.STOP, usage=usage))

    backend = Told(script)
    async with gateway(backend) as server, client_of(server) as client:
        answer = await client.completions.create(
            model="demo", prompt=["p", "q"], n=2, echo=True, extra_headers={"x-request-id": "r"}
        )
        stream = await client.completions.create(model="demo", prompt=["p", "q"], n=2, stream=True)
        streamed = {choice.index: choice.text async for chunk in stream for choice in chunk.choices}
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "pp0"),
        (1, "pp1"),
        (2, "qq0"),
        (3, "qq1"),
    ]
    assert {request.request_id for request in backend.requests[:2]} == {"r-0", "r-1"}
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 4)
    assert streamed == {0: "p0", 1: "p1", 2: "q0", 3: "q1"}


async def test_prompts_may_be_token_ids() -> None:
    backend = Told(says("A"))
    async with gateway(backend) as server, client_of(server) as client:
        await client.completions.create(model="demo", prompt=[1, 2])
        await client.completions.create(model="demo", prompt=[[3], [4, 5]])
    assert sorted(request.prompt for request in backend.requests) == [(1, 2), (3,), (4, 5)]  # type: ignore[type-var]


async def test_log_probabilities_look_as_openai_writes_them() -> None:
    backend = Told(
        sends(
            Chunk("", 0, (65, 66), "AB", (likely("A", "C"), likely("B"))),
            Chunk("", 2, (68,), "D", ((Logprob(68, float("-inf"), 2), Logprob(69, -0.1, 1)),)),
            last(3),
        )
    )
    async with gateway(backend) as server, client_of(server) as client:
        whole = (await client.completions.create(model="demo", prompt="x", logprobs=1)).choices[0].logprobs
        stream = await client.completions.create(model="demo", prompt="x", logprobs=1, stream=True)
        parts = [choice.logprobs async for chunk in stream for choice in chunk.choices]
        ids = await client.completions.create(
            model="demo", prompt="x", logprobs=1, extra_body={"return_tokens_as_token_ids": True}
        )
    assert whole is not None
    assert (whole.tokens, whole.token_logprobs, whole.text_offset) == (
        ["A", "B", "D"],
        [-0.5, -0.5, -9999.0],
        [0, 1, 2],
    )
    assert whole.top_logprobs == [{"A": -0.5, "C": -1.5}, {"B": -0.5}, {"D": -9999.0, "E": -0.1}]
    assert [part.text_offset for part in parts if part is not None] == [[0, 1], [2], []]
    assert ids.choices[0].logprobs is not None
    assert ids.choices[0].logprobs.tokens == ["token_id:65", "token_id:66", "token_id:68"]


async def test_prompt_log_probabilities_are_vllms() -> None:
    prompt = ((), likely("B", "C"))
    backend = Told(sends(Chunk("", 0, (65,), "A", prompt_logprobs=prompt), last()))
    async with gateway(backend) as server, aiohttp.ClientSession() as session:
        asked = {"prompt": "xy", "prompt_logprobs": 1}
        async with session.post(url(server, "/v1/completions"), json=asked) as answer:
            choice = (await answer.json())["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "66": {"logprob": -0.5, "rank": 1, "decoded_token": "B"},
            "67": {"logprob": -1.5, "rank": 2, "decoded_token": "C"},
        },
    ]


async def test_token_ids_and_running_usage_are_told_when_asked_for() -> None:
    asked = {
        "prompt": "xyz",
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"continuous_usage_stats": True, "include_usage": True},
    }
    async with (
        gateway(Told(says("A", "B"))) as server,
        aiohttp.ClientSession() as session,
        session.post(url(server, "/v1/completions"), json=asked) as answer,
    ):
        body = await answer.read()
    first, second, usage, done = events_of(body)
    assert b'"token_ids":[65]' in first
    assert b'"prompt_token_ids":[120,121,122]' in first
    assert b'"prompt_token_ids"' not in second
    assert b'"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}' in second
    assert b'"choices":[]' in usage
    assert done == b"[DONE]"


async def test_without_a_model_the_answer_names_the_one_that_is_served() -> None:
    async with (
        gateway(Told(says("A"))) as server,
        aiohttp.ClientSession() as session,
        session.post(url(server, "/v1/completions"), json={"prompt": "x"}) as answer,
    ):
        assert (await answer.json())["model"] == "demo"
