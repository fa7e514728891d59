"""Prompts to token ids: the model's tokenizer and its chat template, in threads of their own.

The tokenizer releases the interpreter lock, so a long prompt does not hold up the router's event loop. Token ids back
to text is the decode worker's business. One file for `tokenizers` and `jinja2`.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from splitserve.core.errors import ConfigError, InvalidRequest
from splitserve.core.request import Chat, ChatMessage, Tool, ToolCall
from splitserve.router.validate import json_of

_THREADS = 4
_OURS = ("messages", "tools")  # variables of a chat template that `template_args` can't say


class Text:
    """Made once per router. Raises ConfigError if the directory has no readable tokenizer. `close` ends the threads."""

    def __init__(self, model_path: Path) -> None:
        self._tokenizer = _read_tokenizer(model_path / "tokenizer.json")
        self._longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)
        settings = _read_settings(model_path / "tokenizer_config.json")
        self._special = {name: _token(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        self._template = _read_template(model_path, settings)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenise")

    async def token_ids(self, prompt: str | Chat, most: int) -> tuple[int, ...]:
        """Text gets what the tokenizer's post-processor adds (a BOS, usually); a rendered chat has its own. Raises
        InvalidRequest naming `messages` if there is no chat template or it refuses them, and for a text that makes more
        than `most` tokens whatever it says: a tokenizer's thread can't be interrupted."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._token_ids, prompt, most)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _token_ids(self, prompt: str | Chat, most: int) -> tuple[int, ...]:
        chat = isinstance(prompt, Chat)
        text = self._rendered(prompt) if isinstance(prompt, Chat) else prompt
        if len(text) > most * self._longest_token:
            field, longest = "messages" if chat else "text", most * self._longest_token
            raise InvalidRequest(
                field,
                f"{len(text)} characters make more than the {most} tokens there is room for "
                f"(no text of more than {longest} characters fits); shorten it",
            )
        return tuple(self._tokenizer.encode(text, add_special_tokens=not chat).ids)

    def _rendered(self, chat: Chat) -> str:
        if self._template is None:
            raise InvalidRequest("messages", "this model has no chat template; send text instead")
        variables = {"add_generation_prompt": not chat.continue_final_message, **_template_args(chat.template_args)}
        tools = [_tool(tool) for tool in chat.tools] or None
        try:
            said = [_message(message) for message in chat.messages]
            text = self._template.render(**self._special, **variables, messages=said, tools=tools)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise InvalidRequest("messages", f"the model's chat template refuses them: {error}") from error
        return _open_ended(text, chat.messages[-1].content) if chat.continue_final_message else text


def _template_args(said: str) -> dict[str, Any]:
    """Raises InvalidRequest unless it is a JSON object of what the template does not get otherwise."""
    if not said:
        return {}
    field = "messages.template_args"
    args = json_of(said, field)
    if not isinstance(args, dict):
        raise InvalidRequest(field, 'must be a JSON object, such as {"enable_thinking": false}')
    for name in _OURS:
        if name in args:
            raise InvalidRequest(field, f"{name!r} is the request's own; leave it out")
    return args


def _message(message: ChatMessage) -> dict[str, Any]:
    """As Hugging Face's templates expect it; what is not said is left out, since some ask whether it is there."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        said["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.reasoning:
        said |= {"reasoning": message.reasoning, "reasoning_content": message.reasoning}
    return said | {name: value for name in ("tool_call_id", "name") if (value := getattr(message, name))}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves."""
    arguments = json_of(call.arguments or "{}", "messages.messages.tool_calls.arguments")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool(tool: Tool) -> dict[str, Any]:
    parameters = json.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _open_ended(text: str, last: str) -> str:
    """The rendered chat up to the end of what its last message says."""
    said = last.strip()
    at = text.rfind(said)
    if not said or at < 0:
        raise InvalidRequest("messages.continue_final_message", "the last message has no text that could go on")
    return text[: at + len(said)]


def _read_tokenizer(file: Path) -> Tokenizer:
    if not file.is_file():
        raise ConfigError(str(file), "no such file; the router needs the model's fast tokenizer (tokenizer.json)")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself, nothing narrower
        raise ConfigError(str(file), f"not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(str(file), f"not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(str(file), "must hold a JSON object")
    return settings


def _token(value: object) -> str:
    """Hugging Face writes a special token as text or as an object with its content."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _read_template(model_path: Path, settings: dict[str, Any]) -> Template | None:
    file = model_path / "chat_template.jinja"
    source = file.read_text() if file.is_file() else _template_in(settings.get("chat_template"))
    if source is None:
        return None
    try:
        return _environment().from_string(source)
    except TemplateError as error:
        raise ConfigError(str(file if file.is_file() else file.parent), f"broken chat template: {error}") from error


def _template_in(setting: object) -> str | None:
    """One template, or a list of named ones of which `default` is for chat."""
    if isinstance(setting, list):
        named = {entry.get("name"): entry.get("template") for entry in setting if isinstance(entry, dict)}
        setting = named.get("default")
    return setting if isinstance(setting, str) else None


def _environment() -> Environment:
    """As Hugging Face's, so that templates written for it work; sandboxed, because they are somebody else's code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what to train on; rendering passes over it."""

    tags = {"generation"}  # noqa: RUF012 jinja2's own name and type

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: object, indent: int | None = None, **_: object) -> str:
    """Unlike jinja2's own it does not escape HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
