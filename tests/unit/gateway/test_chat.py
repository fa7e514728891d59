"""`/v1/chat/completions`, asked by OpenAI's own package."""

import asyncio
import json
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from pydantic import BaseModel

from splitserve.core.request import (
    Chat,
    ChatMessage,
    Chunk,
    FinishReason,
    GenerateRequest,
    StructuredOutput,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from tests.unit.gateway.serving import Told, gateway, last, likely, says, sends, url
from tests.unit.gateway.test_completions import client_of

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "Says it.", "parameters": {"type": "object", "properties": {}}},
}
CALLS = sends(
    Chunk("", 0, (1,), "", tool_calls=(ToolCall(0, "c0", "weather", ""),)),
    Chunk("", 1, (2,), "", tool_calls=(ToolCall(0, arguments='{"city":'),)),
    Chunk("", 2, (3, 4), "", tool_calls=(ToolCall(0, arguments='"Oslo"}'), ToolCall(1, "c1", "weather", "{}"))),
    last(4, finish=FinishReason.TOOL_CALLS),
)


async def asked_with(**fields: Any) -> GenerateRequest:
    """What the backend is asked for."""
    backend = Told(says("A"))
    async with gateway(backend) as server, client_of(server) as client:
        await client.chat.completions.create(**{"model": "demo", "messages": HELLO, **fields})
    return backend.requests[0]


def chat_in(request: GenerateRequest) -> Chat:
    assert isinstance(request.prompt, Chat)
    return request.prompt


async def test_a_chat_is_answered_by_the_assistant() -> None:
    async with gateway(Told(says("Ah", "oy"))) as server, client_of(server) as client:
        answer = await client.chat.completions.create(model="demo", messages=HELLO)
    message = answer.choices[0].message
    assert (message.role, message.content, message.tool_calls) == ("assistant", "Ahoy", None)
    assert (answer.object, answer.choices[0].finish_reason) == ("chat.completion", "stop")
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5


async def test_a_chat_streams_the_role_first_and_each_choice_apart() -> None:
    async with gateway(Told(says("Ah", "oy"))) as server, client_of(server) as client:
        stream = await client.chat.completions.create(model="demo", messages=HELLO, n=2, stream=True)
        deltas = [
            (choice.index, choice.delta, choice.finish_reason) async for part in stream for choice in part.choices
        ]
    for index in range(2):
        own = [(delta, finish) for at, delta, finish in deltas if at == index]
        assert [delta.role for delta, _ in own] == ["assistant", None, None]
        assert [delta.content for delta, _ in own] == ["", "Ah", "oy"]
        assert [finish for _, finish in own] == [None, None, "stop"]


async def test_the_sync_client_works_too() -> None:
    async with gateway(Told(says("Ah", "oy"))) as server:

        def ask() -> str:
            with OpenAI(base_url=url(server, "/v1"), api_key="k") as client:
                stream = client.chat.completions.create(model="demo", messages=HELLO, stream=True)
                return "".join(choice.delta.content or "" for part in stream for choice in part.choices)

        assert await asyncio.to_thread(ask) == "Ahoy"


async def test_messages_keep_their_parts_tool_calls_and_answers() -> None:
    request = await asked_with(
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
                "reasoning_content": "hm",
            },
            {"role": "tool", "tool_call_id": "c", "content": "rain"},
            {"role": "user", "name": "Emma", "content": "well?"},
        ]
    )
    assert chat_in(request).messages == (
        ChatMessage("system", "Be\nbrief."),
        ChatMessage("assistant", "", (ToolCall(0, "c", "weather", "{}"),), reasoning="hm"),
        ChatMessage("tool", "rain", tool_call_id="c"),
        ChatMessage("user", "well?", name="Emma"),
    )


async def test_tools_and_how_to_choose_them_reach_the_router() -> None:
    tool = Tool("weather", "Says it.", '{"type":"object","properties":{}}')
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for said, choice in (
        ("auto", ToolChoice()),
        ("none", ToolChoice(ToolMode.NONE)),
        ("required", ToolChoice(ToolMode.REQUIRED)),
        (named, ToolChoice(function="weather")),
    ):
        chat = chat_in(await asked_with(tools=[WEATHER], tool_choice=said))
        assert (chat.tools, chat.tool_choice) == ((tool,), choice)


async def test_templates_get_their_arguments() -> None:
    body = {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": False}
    chat = chat_in(await asked_with(extra_body=body, reasoning_effort="low"))
    assert json.loads(chat.template_args) == {
        "enable_thinking": False,
        "add_generation_prompt": False,
        "reasoning_effort": "low",
    }
    body = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat_in(await asked_with(extra_body=body)) == Chat(
        (ChatMessage("user", "hello"),), continue_final_message=True
    )


async def test_the_newer_name_of_max_tokens_wins_and_unsaid_means_what_fits() -> None:
    assert (await asked_with(max_completion_tokens=5, max_tokens=9)).sampling.max_tokens == 5
    assert (await asked_with()).sampling.max_tokens is None


async def test_a_schema_is_kept_to() -> None:
    class City(BaseModel):
        name: str

    backend = Told(says('{"name":', '"Oslo"}'))
    async with gateway(backend) as server, client_of(server) as client:
        answer = await client.chat.completions.parse(model="demo", messages=HELLO, response_format=City)
    structured = backend.requests[0].sampling.structured_output
    assert isinstance(structured, StructuredOutput)
    assert json.loads(structured.json_schema)["properties"]["name"]["type"] == "string"
    assert answer.choices[0].message.parsed == City(name="Oslo")


async def test_tool_calls_stream_in_pieces_and_come_whole() -> None:
    async with gateway(Told(CALLS)) as server, client_of(server) as client:
        whole = await client.chat.completions.create(model="demo", messages=HELLO, tools=[WEATHER])
        async with client.chat.completions.stream(model="demo", messages=HELLO, tools=[WEATHER]) as stream:
            events = [event.type async for event in stream]
            final = await stream.get_final_completion()
    for answer in (whole.choices[0], final.choices[0]):
        assert answer.finish_reason == "tool_calls"
        calls: Any = answer.message.tool_calls
        assert [(call.id, call.type, call.function.name, call.function.arguments) for call in calls] == [
            ("c0", "function", "weather", '{"city":"Oslo"}'),
            ("c1", "function", "weather", "{}"),
        ]
    assert whole.choices[0].message.content is None
    assert "tool_calls.function.arguments.delta" in events


async def test_without_parallel_tool_calls_there_is_one() -> None:
    async with gateway(Told(CALLS)) as server, client_of(server) as client:
        common: Any = {"model": "demo", "messages": HELLO, "tools": [WEATHER], "parallel_tool_calls": False}
        whole = await client.chat.completions.create(**common)
        stream = await client.chat.completions.create(**common, stream=True)
        indices = {
            call.index async for part in stream for choice in part.choices for call in choice.delta.tool_calls or ()
        }
    assert len(whole.choices[0].message.tool_calls or ()) == 1
    assert indices == {0}


async def test_reasoning_has_both_of_its_names_and_can_be_left_out() -> None:
    backend = Told(sends(Chunk("", 0, (1,), "", reasoning="hm"), Chunk("", 1, (2,), "yes"), last(2)))
    async with gateway(backend) as server, client_of(server) as client:
        common: Any = {"model": "demo", "messages": HELLO}
        whole = (await client.chat.completions.create(**common)).choices[0].message.model_dump()
        stream = await client.chat.completions.create(**common, stream=True)
        deltas = [choice.delta.model_dump() async for part in stream for choice in part.choices]
        without = await client.chat.completions.create(**common, extra_body={"include_reasoning": False})
    assert (whole["reasoning"], whole["reasoning_content"], whole["content"]) == ("hm", "hm", "yes")
    assert [delta["reasoning"] for delta in deltas if "reasoning" in delta] == ["hm"]
    assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta] == ["hm"]
    assert "reasoning" not in without.choices[0].message.model_dump()


async def test_log_probabilities_have_bytes_and_the_likeliest() -> None:
    backend = Told(sends(Chunk("", 0, (233,), "é", (likely("é", "e", "f"),)), last(1)))
    async with gateway(backend) as server, client_of(server) as client:
        common: Any = {"model": "demo", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
        whole = (await client.chat.completions.create(**common)).choices[0].logprobs
        stream = await client.chat.completions.create(**common, stream=True)
        parts = [choice.logprobs async for part in stream for choice in part.choices if choice.logprobs is not None]
    assert backend.requests[0].sampling.logprobs == 2
    for content in (whole and whole.content, parts[0].content):
        assert content is not None
        assert (content[0].token, content[0].logprob, content[0].bytes) == ("é", -0.5, [195, 169])
        assert [(one.token, one.logprob) for one in content[0].top_logprobs] == [("é", -0.5), ("e", -1.5)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"content": "no role"}]}, "messages[0].role"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [WEATHER]}, "tool_choice"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}}, "guided_regex"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "old"}]}, "functions"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
        ({"extra_body": {"add_generation_prompt": True, "continue_final_message": True}}, "continue_final_message"),
        ({"extra_body": {"structured_outputs": {"structural_tag": "{}"}}}, "structured_outputs.structural_tag"),
        ({"extra_body": {"request_id": "\n"}}, "request_id"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    backend = Told(says("A"))
    async with gateway(backend) as server, AsyncOpenAI(base_url=url(server, "/v1"), api_key="k") as client:
        with pytest.raises(BadRequestError) as refused:
            await client.chat.completions.create(**{"model": "demo", "messages": HELLO, **fields})
    assert refused.value.param == param
    assert str(refused.value.body["message"]).startswith(f"{param}: ")  # type: ignore[index]
    assert backend.requests == []


async def test_what_openais_clients_send_and_does_not_matter_is_passed_over() -> None:
    await asked_with(
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        verbosity="low",
        prompt_cache_key="k",
        safety_identifier="s",
        modalities=["text"],
        parallel_tool_calls=True,
        extra_body={"unheard_of": {"a": [1]}, "use_beam_search": False, "length_penalty": 1.0},
    )
