"""Between wire messages and core's nouns for what clients ask and get.

Pure. See the package's docstring.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from splitserve.core.errors import InvalidRequest
from splitserve.core.request import (
    Chat,
    ChatMessage,
    Chunk,
    FinishReason,
    GenerateRequest,
    Logprob,
    Model,
    Prompt,
    SamplingParams,
    StructuredOutput,
    Timings,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
    Usage,
)
from splitserve.rpc.convert.fields import assign, fill, key_of, same_fields_from, same_fields_to
from splitserve.rpc.gen import inference_pb2

Logprobs = tuple[tuple[Logprob, ...], ...]

FINISH_REASONS: Mapping[FinishReason, inference_pb2.FinishReason] = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: inference_pb2.FINISH_REASON_TOOL_CALLS,
}
_TOOL_MODES: Mapping[ToolMode, inference_pb2.ToolChoice.Mode] = {
    ToolMode.AUTO: inference_pb2.ToolChoice.MODE_AUTO,
    ToolMode.NONE: inference_pb2.ToolChoice.MODE_NONE,
    ToolMode.REQUIRED: inference_pb2.ToolChoice.MODE_REQUIRED,
}
_SAMPLING_DEFAULTS = SamplingParams()
_SAMPLING_SCALARS = tuple(
    field.name
    for field in inference_pb2.SamplingParams.DESCRIPTOR.fields
    if field.has_presence and field.message_type is None
)  # `optional` in the proto: unset takes the dataclass's default
_REQUEST_NAMES = ("model", "request_id", "session_id", "lora", "cache_salt", "traceparent", "tracestate")


# Sampling -----------------------------------------------------------------------------------------------------------
def sampling_to_proto(sampling: SamplingParams) -> inference_pb2.SamplingParams:
    """Raises InvalidRequest naming the field that has no room in its wire type."""
    message = inference_pb2.SamplingParams(ignore_eos=sampling.ignore_eos, include_stop=sampling.include_stop)
    fill(message.stop, sampling.stop, "sampling.stop")
    fill(message.stop_token_ids, sampling.stop_token_ids, "sampling.stop_token_ids")
    fill(message.logit_bias, sampling.logit_bias.items(), "sampling.logit_bias")
    if sampling.structured_output is not None:
        message.structured_output.CopyFrom(_structured_to_proto(sampling.structured_output))
    for name in _SAMPLING_SCALARS:
        value = getattr(sampling, name)
        if value != getattr(_SAMPLING_DEFAULTS, name):
            assign(message, name, value, f"sampling.{name}")
    return message


def sampling_from_proto(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Raises InvalidRequest for a `structured_output` that says nothing."""
    structured = message.structured_output if message.HasField("structured_output") else None
    return SamplingParams(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        logit_bias=dict(message.logit_bias),
        structured_output=_structured_from_proto(structured) if structured is not None else None,
        **{name: getattr(message, name) for name in _SAMPLING_SCALARS if message.HasField(name)},
    )


def _structured_to_proto(structured: StructuredOutput) -> inference_pb2.StructuredOutput:
    """Raises InvalidRequest unless exactly one kind is set."""
    texts = {name: getattr(structured, name) for name in ("json_schema", "regex", "grammar")}
    said = {name: text for name, text in texts.items() if text}
    if structured.choice:
        said["choice"] = inference_pb2.Choices(texts=structured.choice)
    if structured.json_object:
        said["json_object"] = True
    if len(said) != 1:
        raise InvalidRequest("sampling.structured_output", f"says {' and '.join(said) or 'nothing'}; say one kind")
    return inference_pb2.StructuredOutput(**said)


def _structured_from_proto(message: inference_pb2.StructuredOutput) -> StructuredOutput:
    kind = message.WhichOneof("kind")
    values: dict[str, Any] = {"choice": tuple(message.choice.texts)} if kind == "choice" else {}
    said = values or ({str(kind): getattr(message, kind)} if kind else {})
    if not any(said.values()):
        raise InvalidRequest(f"sampling.structured_output{'.' + kind if kind else ''}", "is empty; say what to keep to")
    return StructuredOutput(**said)


# Requests -----------------------------------------------------------------------------------------------------------
def request_to_proto(request: GenerateRequest) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequest naming the field that has no room in its wire type."""
    names = {name: getattr(request, name) for name in _REQUEST_NAMES}
    message = inference_pb2.GenerateRequest(
        sampling=sampling_to_proto(request.sampling), slo_class=request.slo_class, **names
    )
    assign(message, "priority", request.priority, "priority")
    for name in ("deadline_s", "inter_token_deadline_s"):
        if getattr(request, name) is not None:
            assign(message, name, getattr(request, name), name)
    fill(message.output, request.output, "output")
    _set_prompt(message, request.prompt)
    return message


def request_from_proto(message: inference_pb2.GenerateRequest) -> GenerateRequest:
    """Raises InvalidRequest if there is no prompt."""
    return GenerateRequest(
        prompt=_prompt(message),
        sampling=sampling_from_proto(message.sampling),
        slo_class=message.slo_class or "standard",
        priority=message.priority,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        inter_token_deadline_s=message.inter_token_deadline_s if message.HasField("inter_token_deadline_s") else None,
        output=tuple(message.output),
        **{name: getattr(message, name) for name in _REQUEST_NAMES},
    )


def tokenize_to_proto(prompt: str | Chat, model: str = "") -> inference_pb2.TokenizeRequest:
    if isinstance(prompt, str):
        return inference_pb2.TokenizeRequest(model=model, text=prompt)
    return inference_pb2.TokenizeRequest(model=model, messages=_chat_to_proto(prompt))


def tokenize_from_proto(message: inference_pb2.TokenizeRequest) -> str | Chat:
    """Raises InvalidRequest if there is no prompt."""
    kind = message.WhichOneof("prompt")
    if kind == "messages" and message.messages.messages:
        return _chat_from_proto(message.messages)
    if kind == "text":
        return message.text
    raise InvalidRequest(kind or "prompt", "is empty; set text or messages")


def model_to_proto(model: Model) -> inference_pb2.Model:
    return same_fields_to(inference_pb2.Model, model)


def model_from_proto(message: inference_pb2.Model) -> Model:
    return same_fields_from(Model, message)


def _set_prompt(message: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        message.text = prompt
    elif isinstance(prompt, Chat):
        message.messages.CopyFrom(_chat_to_proto(prompt))
    else:
        message.token_ids.SetInParent()
        fill(message.token_ids.ids, prompt, "token_ids")


def _prompt(message: inference_pb2.GenerateRequest) -> Prompt:
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return message.text
    if kind == "token_ids":
        return tuple(message.token_ids.ids)
    if kind == "messages" and message.messages.messages:
        return _chat_from_proto(message.messages)
    raise InvalidRequest(kind or "prompt", "is empty; set text, token_ids or messages")


# Chats --------------------------------------------------------------------------------------------------------------
def tools_to_proto(tools: Iterable[Tool]) -> list[inference_pb2.Tool]:
    return [same_fields_to(inference_pb2.Tool, tool) for tool in tools]


def tools_from_proto(tools: Iterable[inference_pb2.Tool]) -> tuple[Tool, ...]:
    return tuple(same_fields_from(Tool, tool) for tool in tools)


def tool_choice_to_proto(choice: ToolChoice) -> inference_pb2.ToolChoice:
    if choice.function:
        return inference_pb2.ToolChoice(function=choice.function)
    return inference_pb2.ToolChoice(mode=_TOOL_MODES[choice.mode])


def tool_choice_from_proto(message: inference_pb2.ToolChoice) -> ToolChoice:
    return ToolChoice(key_of(_TOOL_MODES, message.mode) or ToolMode.AUTO, message.function)


def tool_calls_to_proto(calls: Iterable[ToolCall]) -> list[inference_pb2.ToolCall]:
    return [same_fields_to(inference_pb2.ToolCall, call) for call in calls]


def tool_calls_from_proto(calls: Iterable[inference_pb2.ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(same_fields_from(ToolCall, call) for call in calls)


def _chat_to_proto(chat: Chat) -> inference_pb2.ChatMessages:
    messages = [
        same_fields_to(inference_pb2.ChatMessage, said, tool_calls=tool_calls_to_proto(said.tool_calls))
        for said in chat.messages
    ]
    choice, tools = tool_choice_to_proto(chat.tool_choice), tools_to_proto(chat.tools)
    return same_fields_to(inference_pb2.ChatMessages, chat, messages=messages, tools=tools, tool_choice=choice)


def _chat_from_proto(message: inference_pb2.ChatMessages) -> Chat:
    messages = tuple(
        same_fields_from(ChatMessage, said, tool_calls=tool_calls_from_proto(said.tool_calls))
        for said in message.messages
    )
    choice, tools = tool_choice_from_proto(message.tool_choice), tools_from_proto(message.tools)
    return same_fields_from(Chat, message, messages=messages, tools=tools, tool_choice=choice)


# What comes back ----------------------------------------------------------------------------------------------------
def chunk_to_proto(chunk: Chunk) -> inference_pb2.GenerateResponse:
    message = inference_pb2.GenerateResponse()
    fill_chunk(message, chunk)
    return message


def fill_chunk(message: inference_pb2.GenerateResponse, chunk: Chunk) -> None:
    """Once per message of every stream: what most chunks don't have is looked at only if it is there."""
    message.request_id = chunk.request_id
    message.index = chunk.index
    message.text = chunk.text
    message.token_ids.extend(chunk.token_ids)
    if chunk.choice:
        message.choice = chunk.choice
    if chunk.logprobs:
        message.logprobs.extend(logprobs_to_proto(chunk.logprobs))
    if chunk.prompt_logprobs:
        message.prompt_logprobs.extend(logprobs_to_proto(chunk.prompt_logprobs))
    if chunk.reasoning:
        message.reasoning = chunk.reasoning
    if chunk.tool_calls:
        message.tool_calls.extend(tool_calls_to_proto(chunk.tool_calls))
    if chunk.finish_reason is not None:
        message.finish_reason = FINISH_REASONS[chunk.finish_reason]
    if chunk.usage is not None:
        message.usage.CopyFrom(same_fields_to(inference_pb2.Usage, chunk.usage))
    if chunk.timings is not None:
        message.timings.CopyFrom(same_fields_to(inference_pb2.Timings, chunk.timings))


def chunk_from_proto(message: inference_pb2.GenerateResponse) -> Chunk:
    """As `fill_chunk`: what most chunks don't have is looked at only if it is there."""
    return Chunk(
        request_id=message.request_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=logprobs_from_proto(message.logprobs) if message.logprobs else (),
        finish_reason=key_of(FINISH_REASONS, message.finish_reason) if message.finish_reason else None,
        usage=same_fields_from(Usage, message.usage) if message.HasField("usage") else None,
        timings=same_fields_from(Timings, message.timings) if message.HasField("timings") else None,
        choice=message.choice,
        reasoning=message.reasoning,
        tool_calls=tool_calls_from_proto(message.tool_calls) if message.tool_calls else (),
        prompt_logprobs=logprobs_from_proto(message.prompt_logprobs) if message.prompt_logprobs else (),
    )


def logprobs_to_proto(tokens: Iterable[tuple[Logprob, ...]]) -> list[inference_pb2.TokenLogprobs]:
    return [
        inference_pb2.TokenLogprobs(
            top=[inference_pb2.Logprob(token_id=p.token_id, logprob=p.logprob, rank=p.rank) for p in token]
        )
        for token in tokens
    ]


def logprobs_from_proto(tokens: Iterable[inference_pb2.TokenLogprobs]) -> Logprobs:
    return tuple(tuple(Logprob(p.token_id, p.logprob, p.rank) for p in token.top) for token in tokens)
