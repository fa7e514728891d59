"""Who gets a request: pure functions over what `fleet` knows, with the rule of `admission` that workers decide by too.

A route is bound whole or not at all: a prefill worker that takes the prompt now and a decode worker that takes its
blocks now, never the same one, never of different KV formats. No state, no clock, no queue: `router/waiting` asks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from splitserve.core.fleet import Health
from splitserve.core.worker import Pool
from splitserve.kv.layout import blocks_for, differing_field
from splitserve.routing.admission import Limits, decode_blocks, fits_decode, fits_prefill
from splitserve.routing.fleet import Candidate

_LEAST_TOKENS_TO_MOVE = (
    2  # The last token's KV is recomputed where it is decoded: of one token nothing is left to move.
)


@dataclass(frozen=True, slots=True)
class Need:
    """What one request needs. `avoid`: workers that failed it, used only when no other is left; `exclude`: never."""

    tokens: int  # prompt and output already sent
    avoid: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()

    @property
    def picky(self) -> bool:
        """It may have to wait where another request would not."""
        return bool(self.avoid or self.exclude)


@dataclass(frozen=True, slots=True)
class Route:
    """Worker uuids. Without `prefill` the decode worker computes the prompt itself."""

    decode: str
    prefill: str | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Live workers could serve it, but none can take it now."""


@dataclass(frozen=True, slots=True)
class NoRoute:
    """No live worker can ever serve it."""

    reason: str


def choose(candidates: Sequence[Candidate], need: Need) -> Route | Wait | NoRoute:
    """The least loaded workers that take the request now; ties go to the one that joined first."""
    live = [c for c in candidates if c.info.uuid not in need.exclude and c.health is not Health.DRAINING]
    if not live:
        return NoRoute(_why_none(candidates))
    ready = [c for c in live if c.health is Health.READY]
    usable = [c for c in ready if c.info.uuid not in need.avoid] or ready
    return _route(_of(usable, Pool.PREFILL), _of(usable, Pool.DECODE), need.tokens) or Wait()


def choose_target(candidates: Sequence[Candidate], tokens: int, source: str, wanted: str | None) -> str | None:
    """The least loaded worker that takes over a decode of so many tokens, KV and all, from this worker now; `wanted`
    alone if that is given."""
    here = next((c for c in candidates if c.info.uuid == source), None)
    others = [c for c in candidates if c.health is Health.READY and c.info.uuid != source]
    pool = [c for c in others if c.info.uuid == wanted] if wanted is not None else _of(others, Pool.DECODE)
    taking = [
        c for c in pool if here is not None and not differing_field(here.info.kv, c.info.kv) and _parks(c, tokens)
    ]
    return min(taking, key=_decode_load).info.uuid if taking else None


def _why_none(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "no worker has joined this router; start one, or send the request again when one is back"
    names = ", ".join(candidate.info.name for candidate in candidates)
    return f"no worker is left for this request (draining, or it failed there: {names}); send it again later"


def _of(candidates: Iterable[Candidate], pool: Pool) -> list[Candidate]:
    return [candidate for candidate in candidates if candidate.pool is pool]


def _route(prefills: list[Candidate], decodes: list[Candidate], tokens: int) -> Route | None:
    if not prefills or not decodes:
        return _alone(decodes or prefills, tokens)
    movable = [(p, d) for d in decodes for p in prefills if _can_move(p, d, tokens)]
    if not movable:
        return _alone(decodes, tokens)
    pairs = [(p, d) for p, d in movable if _starts(p, tokens) and _parks(d, tokens)]
    if not pairs:
        return None
    prefill, decode = min(pairs, key=lambda pair: (_decode_load(pair[1]), _prefill_load(pair[0])))
    return Route(decode.info.uuid, prefill.info.uuid)


def _alone(candidates: list[Candidate], tokens: int) -> Route | None:
    taking = [c for c in candidates if _computes(c, tokens)]
    return Route(min(taking, key=_alone_load).info.uuid) if taking else None


def _can_move(prefill: Candidate, decode: Candidate, tokens: int) -> bool:
    """Whether this KV can ever go from the one to the other; waiting won't change it."""
    block_size = decode.info.kv.block_size
    return (
        tokens >= _LEAST_TOKENS_TO_MOVE
        and not differing_field(prefill.info.kv, decode.info.kv)
        and blocks_for(tokens, block_size) <= _limits(prefill).reserve
        and decode_blocks(tokens, block_size) <= _limits(decode).parked_limit
    )


def _limits(candidate: Candidate) -> Limits:
    info = candidate.info
    return Limits.of(info.total_blocks, info.max_model_len, info.kv.block_size)


def _starts(prefill: Candidate, tokens: int) -> bool:
    return prefill.accepting and fits_prefill(prefill.load, tokens, prefill.info.kv.block_size)


def _parks(decode: Candidate, tokens: int) -> bool:
    return decode.accepting and fits_decode(decode.load, tokens, decode.info.kv.block_size, waits_for_kv=True)


def _computes(worker: Candidate, tokens: int) -> bool:
    return worker.accepting and fits_decode(worker.load, tokens, worker.info.kv.block_size, waits_for_kv=False)


def _prefill_load(candidate: Candidate) -> tuple[int, int]:
    return candidate.load.prefill_tokens, candidate.load.running


def _decode_load(candidate: Candidate) -> tuple[int, int]:
    return candidate.info.max_sequences - candidate.load.free_sequences, -candidate.load.free_blocks


def _alone_load(candidate: Candidate) -> tuple[int, tuple[int, int]]:
    return candidate.load.prefill_tokens, _decode_load(candidate)
