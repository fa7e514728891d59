"""A chat's output, told apart: text, reasoning and tool calls, by vLLM's own parsers. Their one file.

As vLLM's OpenAI server treats them: a required call, or one of a named function, becomes structured output from the
tools' schemas (or the parser's structural tags, with `strict` schemas); an automatic one is found in the text. The
parsers' state follows from the tokens, so a resumed request replays those that its client has. Runner's thread.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from splitserve.core.config import VllmSettings
from splitserve.core.errors import ConfigError, EngineError, InvalidRequest
from splitserve.core.request import SamplingParams, ToolCall, ToolMode
from splitserve.core.worker import DecodeJob, Parse
from splitserve.engine.protocol import NO_TOOL_PARSER, NO_TOOLS
from splitserve.engine.vllm.translate import refusals, structured_params
from splitserve.engine.vllm.versions import parser_class
from splitserve.kv.job_params import GrammarStart


@dataclass(frozen=True, slots=True)
class Parsed:
    """What some tokens have added."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class Parsers:
    """Those of one worker's model, by the names in its settings. Raises ConfigError for a name that vLLM does not know,
    or whose tokens the model's tokenizer does not have."""

    def __init__(self, settings: VllmSettings, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._reasons = settings.reasoning_parser is not None
        self._finds_calls = settings.tool_parser is not None
        check_names(settings)
        named = {"tool_parser_name": settings.tool_parser, "reasoning_parser_name": settings.reasoning_parser}
        self._whole = _composed(tokenizer, named) if any(named.values()) else None

    def of(self, job: DecodeJob, model_config: Any) -> "OutputParser | None":
        """None if the output is plain text. Raises InvalidRequest naming the field that this worker can't serve, and
        EngineError for a parser that breaks."""
        parse = job.parse
        if parse is None:
            return None
        forced = _forced(parse)
        if forced and not parse.tools:
            raise InvalidRequest("messages.tool_choice", NO_TOOLS)
        calls = bool(parse.tools) and (forced or parse.tool_choice.mode is ToolMode.AUTO)
        if calls and not forced and not self._finds_calls:
            raise InvalidRequest("messages.tools", NO_TOOL_PARSER)
        kind = _with_plain_calls(self._whole) if calls and not self._finds_calls else self._whole
        if kind is None:
            return None
        request = chat_request(parse, job.sampling)
        with _breakage("messages.tools"):
            parser = kind(self._tokenizer, request.tools, model_config=model_config)
            if calls or self._reasons:
                request = parser.adjust_request(request)
        return OutputParser(parser, request, job.prompt, counts_calls=not parse.tool_choice.function)


class OutputParser:
    """One output's. `structured_outputs` and `skip_special_tokens` are what the parser needs of vLLM; `called`: a tool,
    so that the output's end is its calls'. Raises EngineError if the parser breaks: what it raises is one request's
    affair."""

    def __init__(self, parser: Any, request: Any, prompt: Sequence[int], counts_calls: bool) -> None:
        self._parser = parser
        self._request = request
        self._prompt = list(prompt)
        self._counts_calls = counts_calls
        self.structured_outputs = request.structured_outputs
        self.skip_special_tokens = bool(request.skip_special_tokens)
        self.called = False

    def feed(self, text: str, tokens: Sequence[int], finished: bool) -> Parsed:
        with _breakage():
            message = self._parser.parse_delta(text, list(tokens), self._request, self._prompt, finished=finished)
        if message is None:
            return Parsed()
        calls = tuple(_piece(call) for call in message.tool_calls)
        self.called = self.called or (bool(calls) and self._counts_calls)
        return Parsed(message.content or "", message.reasoning or "", calls)

    def grammar_start(self, output: Sequence[int]) -> GrammarStart:
        """A grammar constrains what comes after the reasoning; in the output so far that may have ended, or not."""
        reasoner, tokens = self._parser.reasoning_parser, list(self._prompt)
        with _breakage():
            if reasoner is None or self._request._grammar_from_parser or self._parser.is_reasoning_end(tokens):
                return GrammarStart(True, len(output))
            for count, token in enumerate(output, start=1):
                tokens.append(token)
                if reasoner.is_reasoning_end_streaming(tokens, [token]):
                    return GrammarStart(True, len(output) - count + _belongs_to_content(reasoner, token))
        return GrammarStart(False, 0)


@contextmanager
def _breakage(field: str = "") -> Iterator[None]:
    """Around vLLM's parsers, which are many people's. With a `field` they may also refuse what it holds."""
    try:
        yield
    except Exception as error:
        if field and isinstance(error, refusals()):
            raise InvalidRequest(field, str(error)) from error
        raise EngineError(f"vLLM's parser broke on this request: {type(error).__name__}: {error}") from error


def check_names(settings: VllmSettings) -> None:
    """Raises ConfigError listing vLLM's."""
    if settings.tool_parser is None and settings.reasoning_parser is None:
        return
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for field, manager in (("tool_parser", ToolParserManager), ("reasoning_parser", ReasoningParserManager)):
        name, known = getattr(settings, field), manager.list_registered()
        if name is not None and name not in known:
            raise ConfigError(f"engine.{field}", f"vLLM has no {name!r}; it has {', '.join(known)}")


def chat_request(parse: Parse, sampling: SamplingParams) -> Any:
    """What vLLM's parsers look at. Raises InvalidRequest for a tool's schema, or a function that is not there."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    said: dict[str, Any] = {"messages": [], "skip_special_tokens": sampling.skip_special_tokens}
    if parse.tools:
        said |= {"tools": [_tool(number, parse) for number in range(len(parse.tools))], "tool_choice": _choice(parse)}
    try:
        request = ChatCompletionRequest(**said)
    except ValueError as error:
        raise InvalidRequest("messages.tools", str(error)) from error
    if sampling.structured_output is not None:
        request.structured_outputs = structured_params(sampling.structured_output)
    return request


def _forced(parse: Parse) -> bool:
    return bool(parse.tool_choice.function) or parse.tool_choice.mode is ToolMode.REQUIRED


def _tool(number: int, parse: Parse) -> dict[str, Any]:
    tool, field = parse.tools[number], f"messages.tools[{number}].parameters"
    try:
        parameters = json.loads(tool.parameters) if tool.parameters else None
    except ValueError as error:
        raise InvalidRequest(field, f"not JSON: {error}") from error
    if not isinstance(parameters, dict | None):
        raise InvalidRequest(field, "must be a JSON object, the schema of the arguments")
    said = {"name": tool.name, "description": tool.description, "parameters": parameters}
    strict = _forced(parse)  # else vLLM lets the arguments of a forced call be any JSON
    return {"type": "function", "function": {**said, "strict": strict}}


def _choice(parse: Parse) -> Any:
    function = parse.tool_choice.function
    if not function:
        return parse.tool_choice.mode.value
    if function not in {tool.name for tool in parse.tools}:
        raise InvalidRequest("messages.tool_choice.function", f"{function!r} is none of the tools")
    return {"type": "function", "function": {"name": function}}


def _composed(tokenizer: Any, names: Mapping[str, str | None]) -> Any:
    try:
        return parser_class(tokenizer, names)
    except TypeError as error:
        said = [f"engine.{name.removesuffix('_name')}" for name, parser in names.items() if parser is not None]
        raise ConfigError(" and ".join(said), str(error)) from error


def _with_plain_calls(whole: Any) -> Any:
    """A worker without a tool parser: required and named calls are plain JSON, which needs none."""
    from vllm.parser import DelegatingParser
    from vllm.tool_parsers.abstract_tool_parser import ToolParser

    class PlainCalls(DelegatingParser):  # type: ignore[misc]
        reasoning_parser_cls = whole.reasoning_parser_cls if whole is not None else None
        tool_parser_cls = ToolParser

    return PlainCalls


def _belongs_to_content(reasoner: Any, token: int) -> bool:
    """Whether the token that ends the reasoning is the content's first, as a tool call's start may be."""
    if not hasattr(reasoner, "find_reasoning_end"):
        return False
    end = reasoner.find_reasoning_end([token])
    return end is not None and bool(end.implicit)


def _piece(call: Any) -> ToolCall:
    function = call.function
    return ToolCall(
        call.index,
        call.id or "",
        (function.name or "") if function is not None else "",
        (function.arguments or "") if function is not None else "",
    )
