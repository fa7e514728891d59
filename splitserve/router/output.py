"""What of one request's output is known: each token once and in order, whatever worker it came from. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

from splitserve.core.errors import EngineError
from splitserve.core.request import Chunk, FinishReason, Logprob
from splitserve.core.worker import Delta


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one delta; `index` is the position of the first."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[tuple[Logprob, ...], ...]


class Output:
    """All tokens so far, and those of them that wait to be sent."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._unsent: list[Piece] = []

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
        if delta.token_ids or delta.text:
            self.token_ids.extend(delta.token_ids)
            self._unsent.append(Piece(known, delta.token_ids, delta.text, delta.logprobs))
        return len(delta.token_ids)

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def take_chunk(self, request_id: str) -> Chunk:
        """What waits to be sent, as one chunk; empty at the end of the output if nothing does."""
        pieces, self._unsent = self._unsent, []
        return _merged(request_id, pieces, len(self.token_ids))


def _merged(request_id: str, pieces: Sequence[Piece], end: int) -> Chunk:
    if len(pieces) == 1:  # the common case
        piece = pieces[0]
        return Chunk(request_id, piece.index, piece.token_ids, piece.text, piece.logprobs)
    return Chunk(
        request_id=request_id,
        index=pieces[0].index if pieces else end,
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        text="".join(piece.text for piece in pieces),
        logprobs=tuple(token for piece in pieces for token in piece.logprobs),
    )
