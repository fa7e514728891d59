"""What a simulated output must spell, and how it is told apart again. Pure.

Nothing here understands a prompt. A structured output is one of the choices (the prompt's hash says which), or the
least instance of its JSON schema; a regex or a grammar is refused by name, as is a schema with anything but types,
properties, items, enum, const and anyOf. A chat's output begins with REASONING where the settings have a
`reasoning_parser`. It calls one tool where a call is required, or one function is; and where the choice is the model's
if the prompt spells a tool's name and a bracket, such as `weather(`. Then it is CALL, the call as JSON, and CALL_END:
tokens of the output like all others, so that what is told apart of them goes on where a resumed request left off.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from tokenizers import Tokenizer

from splitserve.core.config import SimSettings
from splitserve.core.errors import InvalidRequest
from splitserve.core.request import StructuredOutput, Tool, ToolMode
from splitserve.core.worker import DecodeJob
from splitserve.engine.protocol import NO_TOOL_PARSER, NO_TOOLS

THINK, THOUGHT = "<think>", "</think>"
REASONING = f"{THINK}It has to be said.{THOUGHT}"
CALL, CALL_END = "<tool_call>", "</tool_call>"

_STRUCTURED = "sampling.structured_output"
_SHAPE = frozenset({"type", "properties", "required", "additionalProperties", "items", "minItems", "enum"})
_OTHERS = frozenset({"const", "anyOf", "title", "description", "default", "examples", "$schema"})
_LEAST: Mapping[str, object] = {"string": "", "integer": 0, "number": 0, "boolean": False, "null": None}
_CALL_SO_FAR = re.compile(r'\{"name": ("[^"]*"), "arguments": (.*)', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Script:
    """`tokens` come first; if `ends`, an end-of-sequence token comes after them. `reasons`, `calls`: what the output is
    told apart into; `by_name`: the function was chosen, so that its call is no end of its own."""

    tokens: tuple[int, ...] = ()
    ends: bool = False
    reasons: bool = False
    calls: bool = False
    by_name: bool = False

    def forced(self, position: int, eos: Sequence[int]) -> int | None:
        """The token that must come at this position of the output."""
        if position < len(self.tokens):
            return self.tokens[position]
        return eos[0] if self.ends and position == len(self.tokens) and eos else None


@dataclass(frozen=True, slots=True)
class Told:
    """An output told apart, as far as that is certain. `name` of the called tool is empty until it is known."""

    reasoning: str = ""
    text: str = ""
    name: str = ""
    arguments: str = ""


def script_of(job: DecodeJob, tokenizer: Tokenizer, settings: SimSettings) -> Script:
    """Raises InvalidRequest naming the field that can't be served, or an output that has left its script."""
    parse, structured = job.parse, job.sampling.structured_output
    reasons = parse is not None and settings.reasoning_parser is not None
    tool = _called(job, tokenizer, settings)
    content = _call(*tool) if tool else _instance_text(structured, job.prompt) if structured is not None else None
    said = (REASONING if reasons else "") + (content or "")
    tokens = tuple(tokenizer.encode(said, add_special_tokens=False).ids)
    if structured is not None and job.output[: len(tokens)] != tokens[: len(job.output)]:
        raise InvalidRequest(_STRUCTURED, "the output so far does not keep to it")
    by_name = parse is not None and bool(parse.tool_choice.function)
    return Script(tokens, content is not None, reasons, tool is not None, by_name)


def told_apart(raw: str, script: Script, finished: bool) -> Told:
    """What the output so far is; more of it only adds to each part."""
    reasoning = ""
    if script.reasons and raw.startswith(THINK):
        reasoning, thought, raw = raw.removeprefix(THINK).partition(THOUGHT)
        if not thought:
            return Told(_certain(reasoning, THOUGHT, finished))
    elif script.reasons and THINK.startswith(raw) and not finished:
        return Told()
    if not script.calls:
        return Told(reasoning, raw)
    text, _, call = raw.partition(CALL)
    known = _CALL_SO_FAR.match(call)
    if known is None:
        return Told(reasoning, _certain(text, CALL, finished or CALL in raw))
    arguments, end, _ = known[2].partition("}" + CALL_END)
    return Told(reasoning, text, json.loads(known[1]), _certain(arguments, "}" + CALL_END, finished or bool(end)))


def _certain(text: str, mark: str, whole: bool) -> str:
    """Without what may turn out to be the beginning of the mark."""
    begun = 0 if whole else next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
    return text[: len(text) - begun]


def _called(job: DecodeJob, tokenizer: Tokenizer, settings: SimSettings) -> tuple[Tool, int] | None:
    """The tool that the output calls, and which one it is."""
    if job.parse is None:
        return None
    tools, choice = list(enumerate(job.parse.tools)), job.parse.tool_choice
    if not tools and (choice.function or choice.mode is ToolMode.REQUIRED):
        raise InvalidRequest("messages.tool_choice", NO_TOOLS)
    if not tools:
        return None
    if choice.function:
        named = [(tool, number) for number, tool in tools if tool.name == choice.function]
        if not named:
            raise InvalidRequest("messages.tool_choice.function", f"{choice.function!r} is none of the tools")
        return named[0]
    if choice.mode is ToolMode.NONE:
        return None
    for number, tool in tools:
        _schema(tool.parameters, f"messages.tools[{number}].parameters")
    if choice.mode is ToolMode.REQUIRED:
        return tools[0][1], 0
    if settings.tool_parser is None:
        raise InvalidRequest("messages.tools", NO_TOOL_PARSER)
    prompt = tokenizer.decode(list(job.prompt))
    return next(((tool, number) for number, tool in tools if f"{tool.name}(" in prompt), None)


def _call(tool: Tool, number: int) -> str:
    field = f"messages.tools[{number}].parameters"
    arguments = _instance(_schema(tool.parameters, field), field) if tool.parameters else {}
    return f"{CALL}{json.dumps({'name': tool.name, 'arguments': arguments})}{CALL_END}"


def _instance_text(structured: StructuredOutput, prompt: Sequence[int]) -> str:
    if structured.choice:
        digest = blake2b(repr(tuple(prompt)).encode(), digest_size=8).digest()
        return structured.choice[int.from_bytes(digest, "little") % len(structured.choice)]
    if structured.json_object:
        return "{}"
    if not structured.json_schema:
        raise InvalidRequest(_STRUCTURED, "the simulated engine has choice, json_schema and json_object only")
    return json.dumps(_instance(_schema(structured.json_schema, _STRUCTURED), _STRUCTURED))


def _schema(text: str, field: str) -> Any:
    try:
        schema = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidRequest(field, f"not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise InvalidRequest(field, "must be a JSON object, a schema")
    return schema


def _instance(schema: Any, field: str) -> object:
    """The least that fits the schema."""
    unknown = sorted(set(schema) - _SHAPE - _OTHERS)
    if unknown:
        raise InvalidRequest(field, f"the simulated engine makes no instance of a schema with {', '.join(unknown)}")
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _instance(schema["anyOf"][0], field)
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: _instance(each, field) for name, each in schema.get("properties", {}).items()}
    if kind == "array":
        return [_instance(schema.get("items", {}), field) for _ in range(schema.get("minItems", 0))]
    if kind not in _LEAST:
        raise InvalidRequest(field, f"the simulated engine knows no type {kind!r}")
    return _LEAST[kind]
