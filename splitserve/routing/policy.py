"""Who gets a request: pure functions over what `fleet` knows, with the rule of `admission` that workers decide by too.

A route is bound whole or not at all: a prefill worker that takes the prompt now and a decode worker that takes its
blocks now, never the same one, never of different KV formats. No state, no clock, no queue: `router/waiting` asks, and
so does the planner's simulator. A decision looks at each candidate once, so its cost is bounded by the sample that
`Fleet.sample` draws from a large fleet.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from splitserve.core.fleet import Health
from splitserve.core.worker import Pool
from splitserve.kv.layout import blocks_for
from splitserve.routing.adaptive import choose_adaptive
from splitserve.routing.admission import decode_blocks, fits_decode, fits_decode_next, fits_prefill
from splitserve.routing.candidate import Candidate
from splitserve.routing.outlook import LEAST_TOKENS_TO_MOVE
from splitserve.routing.route import AS_IT_IS, Need, NoRoute, Route, Split, Wait

MORE_DECODES = 1.25, 2  # times the mean, and so many: a worker with more gets no prompt for what it has cached

_WAIT = Wait()
_READY = Health.READY
_NEVER = (Health.DRAINING, Health.FAILING)  # a silent one may speak again at any moment


def choose(
    everyone: Sequence[Candidate], need: Need, now: float = 0.0, split: Split = AS_IT_IS
) -> Route | Wait | NoRoute:
    """The workers that serve the request now. With objectives, and where every worker's latency is known, by what is
    predicted (`adaptive`), whatever pools they are in. Else the least loaded of each pool, what it has cached taken off
    its load; ties go to the one that joined first. `now`: on the clock of the need's `due`."""
    candidates = _able(everyone, need) if need.exclude or need.lora else everyone
    usable = [c for c in candidates if c.health is _READY]
    if need.avoid:
        usable = [c for c in usable if c.info.uuid not in need.avoid] or usable
    if not usable and all(c.health in _NEVER for c in candidates):
        return NoRoute(_why_none(everyone))
    if need.beside:
        cached = next((c for c in usable if c.info.uuid == need.beside), None)
        if cached is not None and _computes_next(cached, need.tokens):
            return Route(cached.info.uuid) if _computes(cached, need.tokens) else _WAIT
    if need.has_objectives and not [c for c in usable if c.latency is None]:
        return choose_adaptive(usable, need, now, split) or _WAIT
    prefills = [c for c in usable if c.pool is Pool.PREFILL]
    decodes = [c for c in usable if c.pool is Pool.DECODE]
    if need.alone:
        return _alone(decodes or prefills, need) or _WAIT
    return _route(prefills, decodes, need) or _WAIT


def _able(everyone: Sequence[Candidate], need: Need) -> list[Candidate]:
    has_lora = [c for c in everyone if not need.lora or need.lora in c.info.loras]
    return [c for c in has_lora if c.info.uuid not in need.exclude]


def choose_target(candidates: Sequence[Candidate], tokens: int, source: str, wanted: str | None) -> str | None:
    """The least loaded worker that takes over a decode of so many tokens, KV and all, from this worker now; `wanted`
    alone if that is given."""
    here = next((c for c in candidates if c.info.uuid == source), None)
    others = [c for c in candidates if c.health is Health.READY and c.info.uuid != source]
    pool = [c for c in others if (c.info.uuid == wanted if wanted is not None else c.pool is Pool.DECODE)]
    taking = [c for c in pool if here is not None and c.kv_class == here.kv_class and _parks(c, tokens)]
    return min(taking, key=_decode_load).info.uuid if taking else None


def _why_none(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "no worker has joined this router; start one, or send the request again when one is back"
    names = ", ".join(candidate.info.name for candidate in candidates)
    return f"no worker is left for this request (draining, failing, or it failed there: {names}); send it again later"


def _route(prefills: list[Candidate], decodes: list[Candidate], need: Need) -> Route | None:
    tokens = need.tokens
    if not prefills or not decodes:
        return _alone(decodes or prefills, need)
    prefills.sort(key=partial(_prefill_load, need.cached))
    decodes.sort(key=_decode_load)
    without: set[int] = set()  # KV classes in which no prefill worker starts now
    for decode in decodes:
        if decode.kv_class not in without and _receives(decode, tokens) and _parks(decode, tokens):
            for prefill in prefills:
                if prefill.kv_class == decode.kv_class and _sends(prefill, tokens) and _starts(prefill, tokens):
                    return Route(decode.info.uuid, prefill.info.uuid)
            without.add(decode.kv_class)
    senders = {p.kv_class for p in prefills if _sends(p, tokens)}
    receivers = {d.kv_class for d in decodes if _receives(d, tokens)}
    return _alone(decodes, need) if senders.isdisjoint(receivers) else None


def _alone(candidates: list[Candidate], need: Need) -> Route | None:
    taking = [c for c in candidates if _computes(c, need.tokens)]
    if not taking:
        return None
    cached = need.cached
    if cached:
        times, more = MORE_DECODES
        most = times * sum(map(_decodes, taking)) / len(taking) + more
        cached = {c.info.uuid: cached.get(c.info.uuid, 0) for c in taking if _decodes(c) <= most}
    return Route(min(taking, key=partial(_alone_load, cached)).info.uuid)


# Whether KV can ever go this way; waiting won't change it -------------------------------------------
def _sends(prefill: Candidate, tokens: int) -> bool:
    return tokens >= LEAST_TOKENS_TO_MOVE and blocks_for(tokens, prefill.info.kv.block_size) <= prefill.limits.reserve


def _receives(decode: Candidate, tokens: int) -> bool:
    return decode_blocks(tokens, decode.info.kv.block_size) <= decode.limits.parked_limit


# Whether a worker takes a job now -------------------------------------------------------------------------------------
def _starts(prefill: Candidate, tokens: int) -> bool:
    return prefill.accepting and fits_prefill(prefill.load, tokens, prefill.info.kv.block_size)


def _parks(decode: Candidate, tokens: int) -> bool:
    return decode.accepting and fits_decode(decode.load, tokens, decode.info.kv.block_size, waits_for_kv=True)


def _computes(worker: Candidate, tokens: int) -> bool:
    return worker.accepting and fits_decode(worker.load, tokens, worker.info.kv.block_size, waits_for_kv=False)


def _computes_next(worker: Candidate, tokens: int) -> bool:
    """One that has just said no says more in a moment."""
    return fits_decode_next(worker.load, tokens, worker.info.kv.block_size)


# How busy it is -------------------------------------------------------------------------------------------------------
def _prefill_load(cached: Mapping[str, int], candidate: Candidate) -> tuple[int, int]:
    """In tokens, so that who has the prompt cached is preferred until that many more tokens wait there."""
    return candidate.load.prefill_tokens - cached.get(candidate.info.uuid, 0), candidate.load.running


def _decode_load(candidate: Candidate) -> tuple[int, int]:
    return _decodes(candidate), -candidate.load.free_blocks


def _decodes(candidate: Candidate) -> int:
    return candidate.info.max_sequences - candidate.load.free_sequences


def _alone_load(cached: Mapping[str, int], candidate: Candidate) -> tuple[int, tuple[int, int]]:
    return candidate.load.prefill_tokens - cached.get(candidate.info.uuid, 0), _decode_load(candidate)
