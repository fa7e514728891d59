"""Every parameter is honoured or refused by its name."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.errors import InvalidRequest
from splitserve.core.request import StructuredOutput
from splitserve.rpc.convert.parameters import said_in
from splitserve.rpc.gen import grpc_service_pb2 as pb

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    *("max_tokens", "temperature", "stop", "stop_token_ids", "ignore_eos", "logit_bias", "structured_outputs"),
    *("timeout", "deadline_s", "priority", "session_id"),
)


def parameters(**said: Any) -> dict[str, pb.InferParameter]:
    fields = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return {name: pb.InferParameter(**{fields[type(value)]: value}) for name, value in said.items()}


def in_json(**said: Any) -> bytes:
    return json.dumps(said).encode()


def refusal(given: dict[str, pb.InferParameter], text: bytes | None = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        said_in(given, text)
    return refused.value


@pytest.mark.parametrize(
    ("name", "value", "target", "taken"),
    [
        ("max_tokens", 5, "max_tokens", 5),
        ("min_tokens", 2, "min_tokens", 2),
        ("temperature", 0, "temperature", 0.0),
        ("temperature", 0.5, "temperature", 0.5),
        ("top_p", 0.9, "top_p", 0.9),
        ("top_k", -1, "top_k", -1),
        ("min_p", 0.1, "min_p", 0.1),
        ("presence_penalty", 1.0, "presence_penalty", 1.0),
        ("frequency_penalty", 1.0, "frequency_penalty", 1.0),
        ("repetition_penalty", 1.1, "repetition_penalty", 1.1),
        ("seed", 7, "seed", 7),
        ("n", 3, "n", 3),
        ("logprobs", 2, "logprobs", 2),
        ("stop", "END", "stop", ("END",)),
        ("ignore_eos", True, "ignore_eos", True),
        ("skip_special_tokens", False, "skip_special_tokens", False),
        ("include_stop_str_in_output", True, "include_stop", True),
    ],
)
def test_sampling_is_said_in_parameters_or_in_json(name: str, value: Any, target: str, taken: Any) -> None:
    assert said_in(parameters(**{name: value}), None).sampling == {target: taken}
    assert said_in({}, in_json(**{name: value})).sampling == {target: taken}


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop_token_ids": [3, 4]}, {"stop_token_ids": (3, 4)}),
        ({"logit_bias": {"5": -1}}, {"logit_bias": {5: -1.0}}),
        ({"structured_outputs": {"regex": "a+", "json": None}}, {"structured_output": StructuredOutput(regex="a+")}),
        ({"guided_decoding": {"choice": ["a", "b"]}}, {"structured_output": StructuredOutput(choice=("a", "b"))}),
        (
            {"structured_outputs": {"json": {"type": "object"}}},
            {"structured_output": StructuredOutput('{"type": "object"}')},
        ),
        (
            {"temperature": "0.1", "top_k": "5", "ignore_eos": "True"},
            {"temperature": 0.1, "top_k": 5, "ignore_eos": True},
        ),
        ({"max_tokens": None}, {}),
    ],
)
def test_json_says_lists_and_objects_and_numbers_as_text_too(said: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert said_in({}, in_json(**said)).sampling == sampling


@pytest.mark.parametrize(
    ("said", "routing"),
    [
        ({"priority": 3}, {"priority": 3}),
        ({"timeout": 2_500_000}, {"deadline_s": 2.5}),
        ({"timeout": 0}, {}),
        ({"deadline_s": 2}, {"deadline_s": 2.0}),
        ({"inter_token_deadline_s": 0.5}, {"inter_token_deadline_s": 0.5}),
        ({"session_id": "s", "slo_class": "standard"}, {"session_id": "s", "slo_class": "standard"}),
        ({"cache_salt": "x", "lora_name": "polite"}, {"cache_salt": "x", "lora": "polite"}),
    ],
)
def test_routing_is_said_there_too(said: dict[str, Any], routing: dict[str, Any]) -> None:
    assert said_in(parameters(**said), None).routing == routing
    assert said_in({}, in_json(**said)).routing == routing


def test_a_priority_may_come_as_tritons_client_sends_it() -> None:
    assert said_in({"priority": pb.InferParameter(uint64_param=4)}, None).routing == {"priority": 4}


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ({"max_new_tokens": 5}, "parameters.max_new_tokens"),
        ({"best_of": 2}, "parameters.best_of"),
        ({"sequence_id": 2}, "parameters.sequence_id"),
        ({"max_tokens": "5"}, "parameters.max_tokens"),
        ({"max_tokens": 5.0}, "parameters.max_tokens"),
        ({"max_tokens": True}, "parameters.max_tokens"),
        ({"temperature": "0"}, "parameters.temperature"),
        ({"temperature": False}, "parameters.temperature"),
        ({"ignore_eos": 1}, "parameters.ignore_eos"),
        ({"stop": 5}, "parameters.stop"),
        ({"stop_token_ids": "5"}, "parameters.stop_token_ids"),
        ({"session_id": 5}, "parameters.session_id"),
        ({"deadline_s": 0}, "parameters.deadline_s"),
        ({"deadline_s": float("nan")}, "parameters.deadline_s"),
    ],
)
def test_an_unknown_name_or_another_type_is_refused_by_name(said: dict[str, Any], place: str) -> None:
    assert refusal(parameters(**said)).field == place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b"", "sampling_parameters"),
        (b"[]", "sampling_parameters"),
        (b"{", "sampling_parameters"),
        (b"\xff\xfe\x00", "sampling_parameters"),
        (b"[" * 100_000, "sampling_parameters"),
        (b'{"stop": "' + b"x" * 300_000 + b'"}', "sampling_parameters"),
        (b'{"seed": 99999999999999999999}', "sampling_parameters.seed"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "sampling_parameters"),
        (b'{"seed": "' + b"9" * 5000 + b'"}', "sampling_parameters.seed"),
        (b'{"temperature": "warm"}', "sampling_parameters.temperature"),
        (b'{"temperature": 1' + b"0" * 400 + b"}", "sampling_parameters.temperature"),
        (b'{"stop": ["a", 5]}', "sampling_parameters.stop"),
        (b'{"stop": "\\ud800"}', "sampling_parameters.stop"),
        (b'{"stop_token_ids": ["5"]}', "sampling_parameters.stop_token_ids"),
        (b'{"logit_bias": {"a": 1}}', "sampling_parameters.logit_bias"),
        (b'{"structured_outputs": {}}', "sampling_parameters.structured_outputs"),
        (b'{"structured_outputs": {"regex": ""}}', "sampling_parameters.structured_outputs"),
        (b'{"structured_outputs": {"regex": "a", "json_object": true}}', "sampling_parameters.structured_outputs"),
        (b'{"structured_outputs": {"whitespace_pattern": "a"}}', "sampling_parameters.structured_outputs"),
    ],
)
def test_json_that_says_nothing_of_use_is_refused_by_name(text: bytes, place: str) -> None:
    assert refusal({}, text).field == place


def test_what_is_said_twice_is_refused_even_if_it_is_the_same() -> None:
    error = refusal(parameters(max_tokens=5), in_json(max_tokens=5))
    assert str(error) == "sampling_parameters.max_tokens: parameters.max_tokens says it already; say it once"
    assert refusal(parameters(timeout=5, deadline_s=1.0)).field == "parameters.timeout"


def test_a_parameter_without_a_value_is_refused() -> None:
    assert refusal({"seed": pb.InferParameter()}).field == "parameters.seed"


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON_VALUES, max_size=3))
def test_no_json_breaks_the_reading(said: dict[str, Any]) -> None:
    assert (_refused_field(in_json(**said)) or "sampling_parameters").startswith("sampling_parameters")


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_no_bytes_break_the_reading(text: bytes) -> None:
    assert (_refused_field(text) or "sampling_parameters").startswith("sampling_parameters")


def _refused_field(text: bytes) -> str | None:
    try:
        said_in({}, text)
    except InvalidRequest as error:
        return error.field
    return None
