"""What of one request's output is known: each token once and in order, whatever worker it came from. No I/O."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeVar

from splitserve.core.errors import EngineError
from splitserve.core.request import Chunk, FinishReason
from splitserve.core.worker import Delta

T = TypeVar("T")


class Output:
    """All tokens so far, and the deltas of them that wait to be sent. It may begin with tokens that an earlier stream
    has sent; `choice` is which of a request's outputs this is."""

    def __init__(self, token_ids: Sequence[int] = (), choice: int = 0) -> None:
        self.token_ids: list[int] = list(token_ids)
        self.finish_reason: FinishReason | None = None
        self.has_tool_calls = False
        self._choice = choice
        self._unsent: list[Delta] = []

    def accept(self, delta: Delta) -> int:
        """Returns how many of the delta's tokens are new. Raises EngineError for a gap or a partial repetition: the
        stream of such a worker can't be trusted."""
        known = len(self.token_ids)
        if delta.index > known:
            raise EngineError(f"a worker skipped output tokens {known} to {delta.index - 1}")
        if delta.token_ids and delta.index < known:
            if delta.index + len(delta.token_ids) > known:
                raise EngineError(f"a worker repeated output tokens {delta.index} to {known - 1} within new ones")
            return 0
        if delta.token_ids or delta.text or delta.reasoning or delta.tool_calls:
            self.token_ids.extend(delta.token_ids)
            self._unsent.append(delta)
            if delta.tool_calls:
                self.has_tool_calls = True
        return len(delta.token_ids)

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def take_chunk(self, request_id: str) -> Chunk:
        """What waits to be sent, as one chunk; empty at the end of the output if nothing does."""
        chunk = self.chunk(request_id)
        self.note_sent()
        return chunk

    def note_sent(self) -> None:
        """Nothing waits to be sent any more."""
        self._unsent.clear()

    def chunk(self, request_id: str) -> Chunk:
        """As `take_chunk`, and it waits on."""
        deltas = self._unsent
        if not deltas:
            return Chunk(request_id, len(self.token_ids), (), "", choice=self._choice)
        first = deltas[0]
        rest = deltas[1:]
        return Chunk(
            request_id=request_id,
            index=first.index,
            token_ids=_joined([delta.token_ids for delta in deltas]) if rest else first.token_ids,
            text="".join([delta.text for delta in deltas]) if rest else first.text,
            logprobs=_joined([delta.logprobs for delta in deltas]) if rest else first.logprobs,
            choice=self._choice,
            reasoning="".join([delta.reasoning for delta in deltas]) if rest else first.reasoning,
            tool_calls=_joined([delta.tool_calls for delta in deltas]) if rest else first.tool_calls,
            prompt_logprobs=first.prompt_logprobs,
        )


def _joined(parts: Iterable[tuple[T, ...]]) -> tuple[T, ...]:
    return tuple(chain.from_iterable(parts))
