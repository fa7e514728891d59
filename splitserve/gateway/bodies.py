"""The JSON bodies that the gateway reads: OpenAI's fields and vLLM's extensions, typed, as their clients name them.

Pure; one file for what msgspec reads. What is not a field here is ignored, as OpenAI's and vLLM's servers do: clients
send `user`, `metadata`, `store` and what is new next month. What would change the output and can't be done is a field
all the same, in a table of `harmless` values, so that it is refused by its name instead of ignored.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from splitserve.core.errors import InvalidRequest

NO_RAW = msgspec.Raw()
_PLACE = re.compile(r"(.*?)(?: - at (?:`key` in )?`\$\.?(.*)`)?", re.DOTALL)
_MISSING = re.compile(r"missing required field `(.*)`")

BodyT = TypeVar("BodyT")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_timings: bool | None = None


class JsonSchema(msgspec.Struct):
    schema: msgspec.Raw = NO_RAW


class ResponseFormat(msgspec.Struct):
    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct):
    """vLLM's."""

    json: msgspec.Raw = NO_RAW
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: Any = None
    disable_any_whitespace: Any = None
    disable_additional_properties: Any = None


class _Sampling(msgspec.Struct, kw_only=True):
    """What both endpoints take."""

    model: str | None = None
    n: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: msgspec.Raw = NO_RAW
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # splitserve's, as in inference.proto
    slo_class: str | None = None
    deadline_s: float | None = None
    inter_token_deadline_s: float | None = None
    # vLLM's that can't be done
    use_beam_search: Any = None
    length_penalty: Any = None
    add_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logprob_token_ids: Any = None
    spaces_between_special_tokens: Any = None
    guided_whitespace_pattern: Any = None
    thinking_token_budget: Any = None
    repetition_detection: Any = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None


class CompletionBody(_Sampling, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Any = None
    prompt_embeds: Any = None


class Part(msgspec.Struct):
    type: str = "text"
    text: str | None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str = ""


class MessageToolCall(msgspec.Struct):
    function: CalledFunction
    id: str = ""
    type: str = "function"


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: msgspec.Raw = NO_RAW


class ToolParam(msgspec.Struct):
    type: str = "function"
    function: Function | None = None


class FunctionName(msgspec.Struct):
    name: str


class NamedToolChoice(msgspec.Struct):
    type: str = "function"
    function: FunctionName | None = None


class ChatBody(_Sampling, kw_only=True):
    messages: list[Message]
    tools: list[ToolParam] | None = None
    tool_choice: str | NamedToolChoice | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    chat_template: Any = None
    media_io_kwargs: Any = None
    mm_processor_kwargs: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None
    echo: Any = None
    return_prompt_text: Any = None


class TokenizeText(msgspec.Struct, kw_only=True):
    prompt: str
    model: str | None = None
    add_special_tokens: Any = None
    return_token_strs: bool | None = None


class TokenizeChat(ChatBody, kw_only=True):
    return_token_strs: bool | None = None


_EITHER: Mapping[str, Sequence[Any]] = {
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logprob_token_ids": (),
    "spaces_between_special_tokens": (True,),
    "guided_whitespace_pattern": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}
_TEMPLATE: Mapping[str, Sequence[Any]] = {
    "add_special_tokens": (False,),  # a rendered chat has its own
    "chat_template": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
COMPLETION_HARMLESS: Mapping[str, Sequence[Any]] = {
    **_EITHER,
    "add_special_tokens": (True,),
    "suffix": ("",),
    "prompt_embeds": (),
}
CHAT_HARMLESS: Mapping[str, Sequence[Any]] = {
    **_EITHER,
    **_TEMPLATE,
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "echo": (False,),
    "return_prompt_text": (False,),
}
STRUCTURED_HARMLESS: Mapping[str, Sequence[Any]] = {
    "structural_tag": (),
    "whitespace_pattern": (),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
}
TOKENIZE_TEXT_HARMLESS: Mapping[str, Sequence[Any]] = {"add_special_tokens": (True,)}
TOKENIZE_CHAT_HARMLESS = _TEMPLATE


def read_body(body: bytes, kind: type[BodyT]) -> BodyT:
    """Raises InvalidRequest naming the field whose type is wrong, or `body` where it is no JSON."""
    try:
        return msgspec.json.decode(body.decode(), type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("body", f"is not JSON: {error}") from error


def refuse_unless_harmless(body: msgspec.Struct, harmless: Mapping[str, Sequence[Any]], under: str = "") -> None:
    """Raises InvalidRequest for a field that asks for what can't be done."""
    for name, values in harmless.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            raise InvalidRequest(f"{under}{name}", "is not supported; leave it out")


def json_in(raw: msgspec.Raw) -> str:
    """The JSON text of a field that was not looked into; "" if it was absent or null."""
    text = bytes(raw).decode().strip()
    return "" if text == "null" else text


def _wrong_type(message: str) -> InvalidRequest:
    """msgspec writes: Expected `int`, got `str` - at `$.max_tokens`."""
    found = _PLACE.fullmatch(message)
    assert found is not None
    sentence, place = found[1], found[2] or ""
    missing = _MISSING.search(sentence)
    if missing is not None:
        return InvalidRequest(f"{place}.{missing[1]}".lstrip("."), "is missing")
    return InvalidRequest(place or "body", sentence[:1].lower() + sentence[1:])
