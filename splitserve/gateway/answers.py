"""An answer in one piece: chunks put together, then OpenAI's JSON for each endpoint. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from splitserve.core.request import Chunk, FinishReason, Logprob, ToolCall, Usage
from splitserve.core.sink import Sink
from splitserve.gateway.asked import Asked, Look
from splitserve.gateway.backend import Vocabulary
from splitserve.gateway.events import usage_said
from splitserve.gateway.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs

NO_USAGE = Usage(0, 0)


@dataclass(slots=True)
class Gathered:
    """One choice as far as it has come."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[Logprob, ...]] = field(default_factory=list)
    calls: dict[int, list[ToolCall]] = field(default_factory=dict)
    finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.reasoning.append(chunk.reasoning)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        for piece in chunk.tool_calls:
            self.calls.setdefault(piece.index, []).append(piece)
        self.finish_reason = chunk.finish_reason or self.finish_reason

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [_joined(pieces) for _, pieces in sorted(self.calls.items())]


class Gathering:
    """Every choice of one HTTP request, and what its streams ended with."""

    def __init__(self, asked: Asked) -> None:
        self._per_prompt = asked.requests[0].sampling.n
        self.choices = [Gathered() for _ in range(asked.choices)]
        self.prompt_logprobs: dict[int, Sequence[tuple[Logprob, ...]]] = {}
        self.usage = NO_USAGE

    def to(self, prompt: int) -> Sink:
        """What the generation for the prompt of that number sends its chunks to."""
        return _Part(self, prompt)

    def add(self, chunk: Chunk, prompt: int) -> None:
        self.choices[prompt * self._per_prompt + chunk.choice].add(chunk)
        if chunk.prompt_logprobs:
            self.prompt_logprobs[prompt] = chunk.prompt_logprobs
        if chunk.usage is not None:
            self.usage = plus(self.usage, chunk.usage)


@dataclass(frozen=True, slots=True)
class _Part:
    """One prompt's sink: nobody has to be waited for."""

    whole: Gathering
    prompt: int

    def put(self, chunk: Chunk) -> bool:
        self.whole.add(chunk, self.prompt)
        return True

    async def send(self, chunk: Chunk) -> None:
        self.put(chunk)


def plus(one: Usage, other: Usage) -> Usage:
    return Usage(one.prompt_tokens + other.prompt_tokens, one.output_tokens + other.output_tokens)


def completion_answer(
    asked: Asked,
    model: str,
    created: int,
    gathered: Gathering,
    vocabulary: Vocabulary | None,
    prompts: Sequence[tuple[int, ...]],
) -> bytes:
    """`/v1/completions`. `prompts` are the prompts' token ids, if the look asks for them."""
    look, per_prompt = asked.look, asked.requests[0].sampling.n
    vocabulary = None if look.ids_for_tokens else vocabulary
    choices = []
    for index, choice in enumerate(gathered.choices):
        prompt = index // per_prompt
        echo = asked.echoes[prompt] if asked.echoes else ""
        said: dict[str, Any] = {"index": index, "text": echo + choice.text, "logprobs": None}
        if look.top_logprobs is not None:
            said["logprobs"] = completion_logprobs(choice.logprobs, 0, vocabulary)
        if prompt in gathered.prompt_logprobs:
            said["prompt_logprobs"] = prompt_logprobs(gathered.prompt_logprobs[prompt], vocabulary)
        if look.token_ids:
            said |= {"token_ids": choice.token_ids, "prompt_token_ids": prompts[prompt]}
        choices.append({**said, "finish_reason": _finish(choice)})
    about = {"id": f"cmpl-{asked.request_id}", "object": "text_completion", "created": created, "model": model}
    return msgspec.json.encode({**about, "choices": choices, "usage": usage_said(gathered.usage)})


def chat_answer(
    asked: Asked,
    model: str,
    created: int,
    gathered: Gathering,
    vocabulary: Vocabulary | None,
    prompts: Sequence[tuple[int, ...]],
) -> bytes:
    """`/v1/chat/completions`. `prompts` are the prompts' token ids, if the look asks for them."""
    vocabulary = None if asked.look.ids_for_tokens else vocabulary
    answer: dict[str, Any] = {
        "id": f"chatcmpl-{asked.request_id}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [_chat_choice(asked.look, at, one, vocabulary) for at, one in enumerate(gathered.choices)],
        "usage": usage_said(gathered.usage),
    }
    if 0 in gathered.prompt_logprobs:
        answer["prompt_logprobs"] = prompt_logprobs(gathered.prompt_logprobs[0], vocabulary)
    if asked.look.token_ids:
        answer["prompt_token_ids"] = prompts[0]
    return msgspec.json.encode(answer)


def _chat_choice(look: Look, index: int, choice: Gathered, vocabulary: Vocabulary | None) -> dict[str, Any]:
    said: dict[str, Any] = {"index": index, "message": _message(look, choice), "logprobs": None}
    if look.top_logprobs is not None:
        said["logprobs"] = chat_logprobs(choice.logprobs, look.top_logprobs, vocabulary)
    if look.token_ids:
        said["token_ids"] = choice.token_ids
    return {**said, "finish_reason": _finish(choice)}


def _message(look: Look, choice: Gathered) -> dict[str, Any]:
    calls, reasoning = choice.tool_calls, "".join(choice.reasoning)
    if look.one_tool_call:
        calls = calls[:1]
    text = choice.text
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if reasoning and look.reasoning:
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _joined(pieces: Sequence[ToolCall]) -> ToolCall:
    return replace(pieces[0], arguments="".join(piece.arguments for piece in pieces))


def _finish(choice: Gathered) -> str | None:
    return choice.finish_reason.value if choice.finish_reason is not None else None
