"""How many tokens a stream of server-sent events has brought, read from as little of it as possible. No I/O.

Servers tell tokens in three ways, and the first that an event has counts:

1. `usage.completion_tokens`, which `stream_options.continuous_usage_stats` puts into every event (vLLM, splitserve,
   Dynamo): what has been added since the last one;
2. `token_ids` of a choice, which `return_token_ids` asks for (vLLM, splitserve);
3. text: one token an event. An event of several tokens counts as one at first, and a token without text (a part of a
   character) as none; the usage at the stream's end adds what is missing, at the time of the last token or just after.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from splitserve.core.errors import SplitserveError

DONE = b"[DONE]"


class Usage(msgspec.Struct):
    completion_tokens: int | None = 0


class Delta(msgspec.Struct):
    """Of a chat."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    @property
    def tokens(self) -> int:
        if self.token_ids is not None:
            return len(self.token_ids)
        if self.delta is not None:
            return int(bool(self.delta.content or self.delta.reasoning or self.delta.reasoning_content))
        return int(bool(self.text))


class Event(msgspec.Struct):
    """What is needed of one; all else in it is skipped."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None
    message: Any = None  # of an error too, where servers of older vLLM say it at the top


_decode = msgspec.json.Decoder(Event).decode


class EventStream:
    """`ended` once the server has said so. `error`: what it said instead, as it was sent. `heard` is told the token
    ids, if the server says them."""

    def __init__(self, heard: Callable[[Sequence[int]], object] | None = None) -> None:
        self.ended = False
        self._heard = heard
        self.error: bytes | None = None
        self._rest = b""
        self._counted = 0

    def feed(self, data: bytes) -> int:
        """The next bytes, however the network has cut them; returns how many tokens they brought. Raises
        SplitserveError for an event that is not OpenAI's."""
        before = self._counted
        for event in self._events(data):
            if event == DONE:
                self.ended = True
            else:
                self._count(event)
        return self._counted - before

    def _events(self, data: bytes) -> Iterator[bytes]:
        """What each whole line says after `data:`; comments and other fields are not for us."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()

    def _count(self, data: bytes) -> None:
        try:
            event = _decode(data)
        except msgspec.MsgspecError as error:
            said = data[:100].decode(errors="replace")
            raise SplitserveError(f"the server streamed what is no event of OpenAI's API ({error}): {said}") from error
        if event.error is not None or event.message is not None:
            self.error = data
            return
        if event.usage is not None and event.usage.completion_tokens is not None:
            # Never less than what has been seen: a token once told of can't be taken back.
            self._counted = max(self._counted, event.usage.completion_tokens)
        else:
            self._counted += sum(choice.tokens for choice in event.choices)
        for choice in event.choices:
            self.ended = self.ended or choice.finish_reason is not None
            if self._heard is not None and choice.token_ids:
                self._heard(choice.token_ids)
