"""What the async and the sync client share: how a request is put together and when a failed call is made again.

Pure.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from splitserve.core.errors import SplitserveError, Unavailable
from splitserve.core.request import ChatMessage, GenerateRequest, SamplingParams

Prompt = str | Sequence[int] | Sequence[ChatMessage]


class Options(TypedDict, total=False):
    """GenerateRequest's fields beside prompt and sampling."""

    model: str
    request_id: str
    slo_class: str
    priority: int
    session_id: str
    deadline_s: float
    inter_token_deadline_s: float


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
    """`prompt` is text, token ids or chat messages."""
    held: object = prompt if isinstance(prompt, str) else tuple(prompt)
    return GenerateRequest(prompt=held, sampling=sampling or SamplingParams(), **options)  # type: ignore[arg-type]
