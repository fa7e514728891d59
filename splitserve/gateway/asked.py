"""From a request's JSON body to what the router is asked for, and how its answer is to look.

Pure. Raises InvalidRequest with OpenAI's name of the field. Ranges are the router's to check (`router/validate`): it
names proto fields, and `refusals` has OpenAI's name for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from splitserve.core.errors import InvalidRequest
from splitserve.core.request import (
    Chat,
    ChatMessage,
    GenerateRequest,
    Prompt,
    SamplingParams,
    StructuredOutput,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from splitserve.gateway.bodies import (
    CHAT_HARMLESS,
    COMPLETION_HARMLESS,
    STRUCTURED_HARMLESS,
    ChatBody,
    CompletionBody,
    Message,
    Part,
    ResponseFormat,
    StructuredOutputs,
    ToolParam,
    json_in,
    refuse_unless_harmless,
)

MOST_PROMPTS = 256
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; a chat's is what the model's length leaves
_SAME_NAMES = (  # set where they are said
    *("n", "seed", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens", "prompt_logprobs"),
)
_REQUEST_NAMES = ("priority", "cache_salt", "session_id", "slo_class", "deadline_s", "inter_token_deadline_s", "model")


@dataclass(frozen=True, slots=True)
class Look:
    """How the answer is to look. `top_logprobs` None: without any."""

    stream: bool = False
    usage: bool = False
    usage_in_each: bool = False
    timings: bool = False
    top_logprobs: int | None = None
    ids_for_tokens: bool = False
    token_ids: bool = False
    reasoning: bool = True
    one_tool_call: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """One HTTP request: a generation for each prompt. `echoes` are the texts that their answers begin with. `params`
    are names of fields where this request said them in another of the ways that there are."""

    requests: tuple[GenerateRequest, ...]
    look: Look
    request_id: str
    model: str
    echoes: tuple[str, ...] = ()
    params: tuple[tuple[str, str], ...] = ()

    @property
    def choices(self) -> int:
        return len(self.requests) * self.requests[0].sampling.n


def completion_asked(body: CompletionBody, request_id: str) -> Asked:
    refuse_unless_harmless(body, COMPLETION_HARMLESS)
    _check_best_of(body)
    prompts = _prompts(body.prompt)
    look = replace(_look(body), top_logprobs=body.logprobs)
    sampling, params = _sampling(body, body.logprobs)
    if body.max_tokens is None:
        sampling = replace(sampling, max_tokens=_COMPLETION_MAX_TOKENS)
    return Asked(
        requests=tuple(_requests(body, prompts, sampling, request_id)),
        look=look,
        request_id=request_id,
        model=body.model or "",
        echoes=_echoes(body, prompts),
        params=params,
    )


def chat_asked(body: ChatBody, request_id: str) -> Asked:
    refuse_unless_harmless(body, CHAT_HARMLESS)
    top = _chat_logprobs(body)
    look = replace(
        _look(body),
        top_logprobs=top,
        reasoning=body.include_reasoning is not False,
        one_tool_call=body.parallel_tool_calls is False,
    )
    sampling, params = _sampling(body, top)
    if body.max_completion_tokens is not None:
        sampling = replace(sampling, max_tokens=body.max_completion_tokens)
        params = (*params, ("sampling.max_tokens", "max_completion_tokens"))
    requests = tuple(_requests(body, [chat_of(body)], sampling, request_id))
    return Asked(requests, look, request_id, body.model or "", params=(*params, ("sampling.logprobs", "top_logprobs")))


def chat_of(body: ChatBody) -> Chat:
    """The chat to be rendered."""
    args: dict[str, Any] = {**(body.chat_template_kwargs or {})}
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest("continue_final_message", "can't be said with add_generation_prompt; say one of them")
    if body.add_generation_prompt is False and not body.continue_final_message:
        args["add_generation_prompt"] = False
    args |= {name: value for name in ("documents", "reasoning_effort") if (value := getattr(body, name)) is not None}
    return Chat(
        messages=tuple(_message(message, f"messages[{at}]") for at, message in enumerate(body.messages)),
        tools=tuple(_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or ())),
        tool_choice=_tool_choice(body),
        template_args=msgspec.json.encode(args).decode() if args else "",
        continue_final_message=bool(body.continue_final_message),
    )


# Prompts ------------------------------------------------------------------------------------------------------------
def _prompts(said: str | list[str | int | list[int]]) -> Sequence[str | tuple[int, ...]]:
    if isinstance(said, str):
        return [said]
    kinds = set(map(type, said))
    if len(kinds) > 1:
        raise InvalidRequest("prompt", "mixes texts and token ids; send one kind")
    if not kinds:
        raise InvalidRequest("prompt", "is empty; a prompt needs one token at least")
    if kinds == {int}:
        return [tuple(said)]  # type: ignore[arg-type]
    if len(said) > MOST_PROMPTS:
        raise InvalidRequest("prompt", f"{len(said)} prompts; at most {MOST_PROMPTS} in one request")
    return [one if isinstance(one, str) else tuple(one) for one in said]  # type: ignore[arg-type]


def _requests(
    body: CompletionBody | ChatBody, prompts: Sequence[Prompt], sampling: SamplingParams, request_id: str
) -> Iterator[GenerateRequest]:
    said = {name: value for name in _REQUEST_NAMES if (value := getattr(body, name)) is not None}
    for at, prompt in enumerate(prompts):
        own_id = request_id if len(prompts) == 1 else f"{request_id}-{at}"
        yield GenerateRequest(prompt=prompt, sampling=sampling, request_id=own_id, **said)


def _echoes(body: CompletionBody, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    if not body.echo:
        return ()
    if body.logprobs is not None:
        raise InvalidRequest("echo", "can't be said with logprobs; ask for prompt_logprobs instead")
    texts = tuple(prompt for prompt in prompts if isinstance(prompt, str))
    if len(texts) != len(prompts):
        raise InvalidRequest("echo", "needs a prompt of text: the gateway does not turn token ids into text")
    return texts


def _check_best_of(body: CompletionBody) -> None:
    if body.best_of not in (None, body.n or 1):
        raise InvalidRequest("best_of", "is not supported above n; ask for n outputs and choose among them")


# Sampling -----------------------------------------------------------------------------------------------------------
def _look(body: CompletionBody | ChatBody) -> Look:
    stream, options = bool(body.stream), body.stream_options
    if options is not None and not stream:
        raise InvalidRequest("stream_options", "only with stream: true")
    if stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs", "not with stream: true")
    in_each = bool(options is not None and options.continuous_usage_stats)
    return Look(
        stream=stream,
        usage=in_each or bool(options is not None and options.include_usage),
        usage_in_each=in_each,
        timings=bool(options is not None and options.include_timings),
        ids_for_tokens=bool(body.return_tokens_as_token_ids),
        token_ids=bool(body.return_token_ids),
    )


def _sampling(
    body: CompletionBody | ChatBody, logprobs: int | None
) -> tuple[SamplingParams, tuple[tuple[str, str], ...]]:
    structured, param = _structured(body)
    said = {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    sampling = SamplingParams(
        max_tokens=body.max_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        logprobs=logprobs,
        structured_output=structured,
        **said,
    )
    return sampling, (("sampling.structured_output", param),) if param else ()


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs", "only with logprobs: true")
    return None


def _structured(body: CompletionBody | ChatBody) -> tuple[StructuredOutput | None, str]:
    """What the output must keep to, and the name of the field that says so."""
    said = [*_in_format(body.response_format), *_in_structured_outputs(body.structured_outputs), *_in_guided(body)]
    if not said:
        return None, ""
    if len(said) > 1:
        raise InvalidRequest(said[1][0], f"can't be said with {said[0][0]}; say one of them")
    return said[0][1], said[0][0]


def _in_format(said: ResponseFormat | None) -> Iterator[tuple[str, StructuredOutput]]:
    if said is None or said.type == "text":
        return
    if said.type == "json_object":
        yield "response_format", StructuredOutput(json_object=True)
    elif said.type != "json_schema":
        raise InvalidRequest("response_format.type", f"{said.type!r}: there are text, json_object and json_schema")
    elif said.json_schema is None or not json_in(said.json_schema.schema):
        raise InvalidRequest("response_format.json_schema.schema", "is missing")
    else:
        yield "response_format", StructuredOutput(json_schema=json_in(said.json_schema.schema))


def _in_structured_outputs(said: StructuredOutputs | None) -> Iterator[tuple[str, StructuredOutput]]:
    if said is None:
        return
    refuse_unless_harmless(said, STRUCTURED_HARMLESS, "structured_outputs.")
    yield from _kinds("structured_outputs.", json_in(said.json), said.regex, said.choice, said.grammar)
    if said.json_object:
        yield "structured_outputs.json_object", StructuredOutput(json_object=True)


def _in_guided(body: CompletionBody | ChatBody) -> Iterator[tuple[str, StructuredOutput]]:
    """vLLM's older names of the same."""
    json = json_in(body.guided_json)
    yield from _kinds("guided_", json, body.guided_regex, body.guided_choice, body.guided_grammar)


def _kinds(
    under: str, json: str, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[tuple[str, StructuredOutput]]:
    if json:
        yield f"{under}json", StructuredOutput(json_schema=_schema(json))
    if regex is not None:
        yield f"{under}regex", StructuredOutput(regex=regex)
    if choice is not None:
        yield f"{under}choice", StructuredOutput(choice=tuple(choice))
    if grammar is not None:
        yield f"{under}grammar", StructuredOutput(grammar=grammar)


def _schema(json: str) -> str:
    """A schema comes as an object, or as a text that holds one."""
    return msgspec.json.decode(json, type=str) if json.startswith('"') else json


# Chats --------------------------------------------------------------------------------------------------------------
def _message(message: Message, place: str) -> ChatMessage:
    return ChatMessage(
        role=message.role,
        content=_content(message.content, f"{place}.content"),
        tool_calls=tuple(
            ToolCall(at, call.id, call.function.name, call.function.arguments)
            for at, call in enumerate(message.tool_calls or ())
        ),
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
        reasoning=message.reasoning or message.reasoning_content or "",
    )


def _content(said: str | list[Part] | None, place: str) -> str:
    """Parts become lines, as in vLLM."""
    if said is None or isinstance(said, str):
        return said or ""
    for at, part in enumerate(said):
        if part.type != "text":
            raise InvalidRequest(f"{place}[{at}].type", f"{part.type!r} is not supported; send text")
        if part.text is None:
            raise InvalidRequest(f"{place}[{at}].text", "is missing")
    return "\n".join(part.text or "" for part in said)


def _tool(tool: ToolParam, place: str) -> Tool:
    if tool.type != "function":
        raise InvalidRequest(f"{place}.type", f"{tool.type!r} is not supported; there is function")
    if tool.function is None:
        raise InvalidRequest(f"{place}.function", "is missing")
    return Tool(tool.function.name, tool.function.description or "", json_in(tool.function.parameters))


def _tool_choice(body: ChatBody) -> ToolChoice:
    said = body.tool_choice
    if said is None:
        return ToolChoice()
    if isinstance(said, str):
        if said not in tuple(ToolMode):
            raise InvalidRequest("tool_choice", f"{said!r}: there are auto, none, required and a function")
        _check_tools_said(body, said != ToolMode.REQUIRED)
        return ToolChoice(ToolMode(said))
    if said.type != "function" or said.function is None or not said.function.name:
        raise InvalidRequest("tool_choice", 'name one as {"type": "function", "function": {"name": ...}}')
    _check_tools_said(body, False)
    return ToolChoice(function=said.function.name)


def _check_tools_said(body: ChatBody, may_lack: bool) -> None:
    if not body.tools and not may_lack:
        raise InvalidRequest("tool_choice", "needs tools; there are none")
