"""A stream's chunks as server-sent events, as OpenAI's clients read them: bytes in one piece per chunk.

No I/O. Nearly every chunk is text and nothing else; for those an event is what is the same all along the stream, made
once, around the text as JSON. Whatever else a chunk may have takes the long way, through a dict.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from splitserve.core.request import Chunk, ToolCall, Usage
from splitserve.gateway.asked import Asked
from splitserve.gateway.backend import Vocabulary
from splitserve.gateway.logprobs import chat_logprobs, completion_logprobs, token_text

DONE = b"data: [DONE]\n\n"
_DATA, _END = b"data: ", b"\n\n"

_encode = msgspec.json.Encoder().encode


class Events(ABC):
    """Of one HTTP request. `prompts` are its prompts' token ids, if the look asks for what needs them."""

    _object = ""
    _id = ""
    _before, _after = b"", b""  # the text, in a choice

    def __init__(
        self,
        asked: Asked,
        model: str,
        created: int,
        vocabulary: Vocabulary | None = None,
        prompts: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self._look = asked.look
        self._vocabulary = None if asked.look.ids_for_tokens else vocabulary
        self._prompts = prompts
        self._per_prompt = asked.requests[0].sampling.n
        self._echoes = asked.echoes
        self._output_tokens = 0
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._about = {
            "id": f"{self._id}{asked.request_id}",
            "object": self._object,
            "created": created,
            "model": model,
        }
        self._plain = asked.look.top_logprobs is None and not (asked.look.token_ids or asked.look.usage_in_each)
        self._heads = [self._head(index) for index in range(asked.choices)]
        self._tail = self._after + (b'],"usage":null}' if asked.look.usage else b"]}") + _END

    def of(self, chunk: Chunk, prompt: int = 0) -> bytes:
        """The event of a chunk that the prompt of that number has got; before a choice's first, what begins it."""
        index = prompt * self._per_prompt + chunk.choice
        if index in self._begun:
            if self._plain and chunk.finish_reason is None and not chunk.reasoning and not chunk.tool_calls:
                return self._heads[index] + _encode(chunk.text) + self._tail
            return self._event(self._choice(chunk, index), chunk)
        self._begun.add(index)
        return self._first(chunk, index, prompt)

    def usage(self, usage: Usage) -> bytes:
        """The event that a stream with usage ends with."""
        return self._data({**self._about, "choices": [], "usage": usage_said(usage)})

    def _head(self, index: int) -> bytes:
        about = _encode(self._about)[:-1]
        return _DATA + about + b',"choices":[{"index":' + str(index).encode() + b"," + self._before

    @abstractmethod
    def _first(self, chunk: Chunk, index: int, prompt: int) -> bytes: ...

    @abstractmethod
    def _choice(self, chunk: Chunk, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, chunk: Chunk, index: int) -> dict[str, Any] | None: ...

    def _around(self, said: dict[str, Any], chunk: Chunk, index: int) -> dict[str, Any]:
        """A choice of which `said` is the endpoint's own part."""
        finish = chunk.finish_reason.value if chunk.finish_reason is not None else None
        choice = {"index": index, **said, "logprobs": self._logprobs(chunk, index), "finish_reason": finish}
        return {**choice, "token_ids": chunk.token_ids} if self._look.token_ids else choice

    def _event(self, choice: dict[str, Any], chunk: Chunk, **beside: Any) -> bytes:
        event = {**self._about, "choices": [choice], **beside}
        self._output_tokens += len(chunk.token_ids)
        if self._look.usage_in_each:
            event["usage"] = usage_said(Usage(sum(map(len, self._prompts)), self._output_tokens))
        elif self._look.usage:
            event["usage"] = None
        if self._look.timings and chunk.timings is not None:
            event["timings"] = chunk.timings
        return self._data(event)

    def _data(self, event: dict[str, Any]) -> bytes:
        return _DATA + _encode(event) + _END


class CompletionEvents(Events):
    _object = "text_completion"
    _id = "cmpl-"
    _before, _after = b'"text":', b',"logprobs":null,"finish_reason":null}'

    def _first(self, chunk: Chunk, index: int, prompt: int) -> bytes:
        choice = self._choice(chunk, index)
        if self._echoes:
            choice["text"] = self._echoes[prompt] + chunk.text
        if self._look.token_ids:
            choice["prompt_token_ids"] = self._prompts[prompt]
        return self._event(choice, chunk)

    def _choice(self, chunk: Chunk, index: int) -> dict[str, Any]:
        return self._around({"text": chunk.text}, chunk, index)

    def _logprobs(self, chunk: Chunk, index: int) -> dict[str, Any] | None:
        if self._look.top_logprobs is None:
            return None
        offset = self._offsets.get(index, 0)
        texts = (token_text(token[0].token_id, self._vocabulary) for token in chunk.logprobs)
        self._offsets[index] = offset + sum(map(len, texts))
        return completion_logprobs(chunk.logprobs, offset, self._vocabulary)


class ChatEvents(Events):
    _object = "chat.completion.chunk"
    _id = "chatcmpl-"
    _before, _after = b'"delta":{"content":', b'},"logprobs":null,"finish_reason":null}'

    def _first(self, chunk: Chunk, index: int, prompt: int) -> bytes:
        said = {"delta": {"role": "assistant", "content": ""}}
        begin = Chunk(chunk.request_id, chunk.index, (), "", choice=chunk.choice)
        beside = {"prompt_token_ids": self._prompts[prompt]} if self._look.token_ids else {}
        role = {"index": index, **said, "logprobs": None, "finish_reason": None}
        return self._event(role, begin, **beside) + self._event(self._choice(chunk, index), chunk)

    def _choice(self, chunk: Chunk, index: int) -> dict[str, Any]:
        return self._around({"delta": self._delta(chunk)}, chunk, index)

    def _delta(self, chunk: Chunk) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if chunk.reasoning and self._look.reasoning:
            delta |= {"reasoning": chunk.reasoning, "reasoning_content": chunk.reasoning}
        calls = [_call(call) for call in chunk.tool_calls if call.index == 0 or not self._look.one_tool_call]
        if calls:
            delta["tool_calls"] = calls
        if chunk.text or not (delta or chunk.finish_reason):
            delta["content"] = chunk.text
        return delta

    def _logprobs(self, chunk: Chunk, index: int) -> dict[str, Any] | None:
        if self._look.top_logprobs is None:
            return None
        return chat_logprobs(chunk.logprobs, self._look.top_logprobs, self._vocabulary)


def error_event(body: bytes) -> bytes:
    """What a stream that has begun says instead of its end."""
    return _DATA + body + _END


def usage_said(usage: Usage) -> dict[str, int]:
    """As both endpoints write it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "completion_tokens": usage.output_tokens,
    }


def _call(call: ToolCall) -> dict[str, Any]:
    """A call's first piece has its id and name, the others only arguments."""
    if not call.id and not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
