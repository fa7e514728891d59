"""What the async and the sync client share: how a request is put together and when a failed call is made again.

Pure.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from splitserve.core.errors import SplitserveError, Unavailable
from splitserve.core.request import Chat, ChatMessage, GenerateRequest, SamplingParams
from splitserve.rpc.channel import AUTHORIZATION, BEARER

HEALTH_SERVICE = "splitserve.v1.Inference"
ASK_WITHIN_S = 10.0
TOKENIZE_WITHIN_S = 60.0  # a prompt of a million tokens

Prompt = str | Chat | Sequence[int] | Sequence[ChatMessage]


class Options(TypedDict, total=False):
    """GenerateRequest's fields beside prompt and sampling."""

    model: str
    request_id: str
    slo_class: str
    priority: int
    session_id: str
    deadline_s: float
    inter_token_deadline_s: float
    lora: str
    cache_salt: str
    output: tuple[int, ...]
    traceparent: str
    tracestate: str


@dataclass(frozen=True, slots=True)
class Retries:
    """A call answered UNAVAILABLE before its first token is made again up to `most` times, `first_pause_s` later at
    first and twice as long each time, give or take half so that clients don't come back together."""

    most: int = 3
    first_pause_s: float = 0.1

    def pause_s(self, error: SplitserveError, retries: int, tokens_seen: bool) -> float | None:
        """None: don't try again."""
        if not isinstance(error, Unavailable) or tokens_seen or retries >= self.most:
            return None
        return self.first_pause_s * float(2**retries) * random.uniform(0.5, 1.5)


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drained worker did with its requests before it left."""

    finished_requests: int
    migrated_requests: int


@dataclass(frozen=True, slots=True)
class Migrated:
    """`stall_s`: between the last token of the one worker and the first of the other."""

    from_worker: str
    to_worker: str
    stall_s: float


def request_of(prompt: Prompt, sampling: SamplingParams | None, options: Options) -> GenerateRequest:
    """`prompt` is text, token ids, chat messages or a chat with tools."""
    return GenerateRequest(prompt=_held(prompt), sampling=sampling or SamplingParams(), **options)


def _held(prompt: Prompt) -> str | Chat | tuple[int, ...]:
    if isinstance(prompt, str | Chat):
        return prompt
    said = tuple(part for part in prompt if isinstance(part, ChatMessage))
    return Chat(said) if said else tuple(part for part in prompt if not isinstance(part, ChatMessage))


def shown(bearer: str) -> tuple[tuple[str, str], ...] | None:
    """An API key as a call's metadata; None without one."""
    return ((AUTHORIZATION, BEARER + bearer),) if bearer else None
