"""Bad input gets a named error before it costs anything."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from splitserve.core.config import RequestLimits
from splitserve.core.errors import InvalidRequest, ModelNotFound
from splitserve.core.request import (
    Chat,
    ChatMessage,
    GenerateRequest,
    SamplingParams,
    StructuredOutput,
    Tool,
    ToolChoice,
)
from splitserve.router.validate import Limits, check_prompt, check_request

LIMITS = Limits("demo", vocab_size=100, max_tokens=64)
GOOD = GenerateRequest("hello")
DEEP = '{"a": ' * 70 + "1" + "}" * 70
PLAIN = re.compile(r"[.\[].*")  # a field without the part of it that is at fault
TOOL = Tool("f", "does it", '{"type": "object"}')


def chat(*tools: Tool, **changes: Any) -> Chat:
    return Chat((ChatMessage("user", "hi"),), tools, **changes)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("max_tokens", [0, -1]),
        ("min_tokens", [-1]),
        ("temperature", [-0.1, 2.1, math.nan, math.inf, -math.inf]),
        ("top_p", [0.0, -0.5, 1.01, math.nan, math.inf]),
        ("top_k", [-2]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("presence_penalty", [-2.1, 2.1, math.nan, math.inf]),
        ("frequency_penalty", [-2.1, 2.1, math.nan, -math.inf]),
        ("repetition_penalty", [0.0, -1.0, math.nan, math.inf]),
        ("seed", [2**63, -(2**63) - 1]),
        ("stop", [("",), ("a", ""), ("x",) * 17]),
        ("stop_token_ids", [(100,), (-1,)]),
        ("logprobs", [-1, 21]),
        ("prompt_logprobs", [-1, 21]),
        ("n", [0, -1, 17]),
        ("logit_bias", [{100: 1.0}, {-1: 1.0}, dict.fromkeys(range(1025), 1.0)]),
        ("logit_bias[5]", [{5: 100.5}, {5: math.nan}, {5: -math.inf}]),
        ("structured_output", [StructuredOutput(regex="a" * 65537), StructuredOutput(choice=("a" * 40_000,) * 2)]),
        (
            "structured_output.json_schema",
            [StructuredOutput("{"), StructuredOutput("[" * 9999), StructuredOutput(DEEP)],
        ),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_name(name: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(InvalidRequest) as raised:
            check_request(replace(GOOD, sampling=replace(SamplingParams(), **{PLAIN.sub("", name): value})), LIMITS)
        assert raised.value.field == f"sampling.{name}", value


@pytest.mark.parametrize(
    "good",
    [
        SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, min_p=1.0, logprobs=20, seed=-(2**63)),
        SamplingParams(presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=0.01, logprobs=0),
        SamplingParams(stop=("x",) * 16, stop_token_ids=(0, 99), max_tokens=1, min_tokens=1),
    ],
)
def test_the_ends_of_every_range_are_inside(good: SamplingParams) -> None:
    check_request(replace(GOOD, sampling=good), LIMITS)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": ""}, "text"),
        ({"prompt": ()}, "token_ids.ids"),
        ({"prompt": (1, 100)}, "token_ids.ids"),
        ({"prompt": (1, -1)}, "token_ids.ids"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": math.nan}, "deadline_s"),
        ({"deadline_s": math.inf}, "deadline_s"),
        ({"inter_token_deadline_s": -1.0}, "inter_token_deadline_s"),
        ({"priority": 1001}, "priority"),
        ({"slo_class": "gold"}, "slo_class"),
        ({"request_id": "x" * 257}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"session_id": "a\x00"}, "session_id"),
        ({"sampling": SamplingParams(max_tokens=3, min_tokens=4)}, "sampling.min_tokens"),
        ({"prompt": Chat(())}, "messages"),
        ({"prompt": chat(*[TOOL] * 129)}, "messages.tools"),
        ({"prompt": chat(replace(TOOL, description="x" * 65536))}, "messages.tools"),
        ({"prompt": chat(replace(TOOL, name=""))}, "messages.tools[0].name"),
        ({"prompt": chat(TOOL, replace(TOOL, parameters="[]"))}, "messages.tools[1].parameters"),
        ({"prompt": chat(replace(TOOL, parameters="{"))}, "messages.tools[0].parameters"),
        ({"prompt": chat(replace(TOOL, parameters=DEEP))}, "messages.tools[0].parameters"),
        ({"prompt": chat(TOOL, tool_choice=ToolChoice(function="g"))}, "messages.tool_choice"),
        ({"output": (100,)}, "output"),
        ({"output": (1,), "sampling": SamplingParams(n=2)}, "output"),
    ],
)
def test_anything_else_out_of_place_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_request(replace(GOOD, **changes), LIMITS)
    assert raised.value.field == field


def test_a_chat_with_tools_is_taken() -> None:
    check_request(replace(GOOD, prompt=chat(TOOL, tool_choice=ToolChoice(function="f"))), LIMITS)


@pytest.mark.parametrize(("model", "lora"), [("poet", ""), ("", "poet"), ("demo", "poet"), ("poet", "poet")])
def test_an_adapter_may_be_named_as_the_model(model: str, lora: str) -> None:
    limits = replace(LIMITS, loras=("poet",))
    assert check_request(replace(GOOD, model=model, lora=lora), limits).lora == "poet"
    assert check_request(GOOD, limits).lora == ""


@pytest.mark.parametrize(("model", "lora"), [("clerk", ""), ("", "clerk"), ("poet", "clerk"), ("demo", "demo")])
def test_an_adapter_that_no_worker_has_is_not_found(model: str, lora: str) -> None:
    with pytest.raises(ModelNotFound, match="poet"):
        check_request(replace(GOOD, model=model, lora=lora), replace(LIMITS, loras=("poet",)))


def test_an_output_that_is_as_long_as_was_asked_for_leaves_nothing_to_do() -> None:
    asks = replace(GOOD, sampling=SamplingParams(max_tokens=2), output=(1, 2))
    with pytest.raises(InvalidRequest, match=r"^output: has all of max_tokens"):
        check_prompt(asks, [1], LIMITS)
    assert check_prompt(replace(asks, output=(1,)), [1], LIMITS).max_tokens == 2


def test_prompt_logprobs_are_bounded_over_the_whole_prompt() -> None:
    limits = replace(LIMITS, request=RequestLimits(prompt_logprobs=30))
    asks = replace(GOOD, sampling=SamplingParams(prompt_logprobs=2))
    check_prompt(asks, [1] * 10, limits)
    with pytest.raises(InvalidRequest, match=r"^sampling\.prompt_logprobs: makes 33 entries for 11 prompt tokens"):
        check_prompt(asks, [1] * 11, limits)


def test_a_router_may_take_shorter_prompts_than_its_fleet() -> None:
    limits = replace(LIMITS, request=RequestLimits(prompt_tokens=8))
    check_prompt(GOOD, [1] * 8, limits)
    with pytest.raises(InvalidRequest, match=r"^text: 9 tokens"):
        check_prompt(GOOD, [1] * 9, limits)


@pytest.mark.parametrize("model", ["", "demo"])
def test_the_model_served_may_be_named_or_left_out(model: str) -> None:
    check_request(replace(GOOD, model=model), LIMITS)


def test_another_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="'other' is not served here"):
        check_request(replace(GOOD, model="other"), LIMITS)


def test_a_prompt_must_leave_room_for_a_token() -> None:
    check_prompt(GOOD, [1] * 63, LIMITS)
    with pytest.raises(InvalidRequest, match=r"^text: 64 tokens"):
        check_prompt(GOOD, [1] * 64, LIMITS)


def test_a_prompt_that_is_too_long_is_refused_before_its_tokens_are_looked_at() -> None:
    """Looking at millions of them would hold up every other request of the router."""
    looked_at: list[object] = []

    class Token(int):
        def __ge__(self, other: int) -> bool:
            looked_at.append(self)
            return True

    with pytest.raises(InvalidRequest, match="room for") as raised:
        check_request(replace(GOOD, prompt=(Token(5),) * 64), LIMITS)
    assert raised.value.field == "token_ids.ids"
    assert not looked_at
    check_request(replace(GOOD, prompt=(Token(5),) * 63), LIMITS)
    assert len(looked_at) == 63


def test_a_prompt_that_holds_no_token_is_empty() -> None:
    with pytest.raises(InvalidRequest, match=r"^messages:"):
        check_prompt(GenerateRequest(Chat((ChatMessage("user", ""),))), [], LIMITS)


def test_explicit_max_tokens_must_fit_after_the_prompt() -> None:
    asks = replace(GOOD, sampling=SamplingParams(max_tokens=54))
    assert check_prompt(asks, [1] * 10, LIMITS).max_tokens == 54
    with pytest.raises(InvalidRequest, match=r"^sampling\.max_tokens: 54, but 11 prompt tokens leave 53"):
        check_prompt(asks, [1] * 11, LIMITS)


def test_min_tokens_must_fit_after_the_prompt() -> None:
    with pytest.raises(InvalidRequest, match=r"^sampling\.min_tokens"):
        check_prompt(replace(GOOD, sampling=SamplingParams(min_tokens=60)), [1] * 10, LIMITS)


def test_unset_max_tokens_is_what_is_left() -> None:
    assert check_prompt(GOOD, [1] * 10, LIMITS).max_tokens == 54
