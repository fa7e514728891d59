"""A route by the seconds that it is predicted to take, whatever pools the workers are in. Pure.

Any worker may read a prompt, for itself or for another, and any may decode; a request's own slack and everyone else's
decide. Of the routes that are predicted to bring the first token in time, with some time left in hand, the one that
costs the fleet least is taken: as a rule a worker without decodes reads the prompt, and the busiest worker decodes it
whose steps stay within the TPOT objectives of everyone there. If none is in time the soonest is taken, which may be a
decode worker that reads the prompt itself in its decodes' slack (`slack`). So with tight TPOT objectives a fleet splits
into few workers that decode and many that read; with tight TTFT objectives every worker does both; and it moves between
the two request by request.

Where the cheapest route in time begins with a worker that still reads another prompt, the request waits for it: as its
time runs out it has the same choice again. Where no worker can keep the TPOT objectives with one more decode it waits
too; a worker that has no decodes at all takes one, unless so many decode that a late request is the lesser evil: each
that begins to reads more slowly for as long, and makes others late.

A worker that decodes keeps what it reads unless another's steps are cheaper by more than the hand-over takes: the one
pushes KV beside its decodes, the other computes the last token beside its own, and two workers that decode alike would
pass requests to and fro for nothing.

A worker with the prompt's beginning cached computes only the rest, and so costs less. It may be given the prompt while
it reads others, since these will take no longer than what the cache saves: the first token comes no later than from an
idle worker without. Behind more than that the cache counts no more. So affinity yields to load, and a beginning that
many prompts share is soon cached by as many workers as they keep busy.
"""

from collections.abc import Sequence
from math import ceil
from operator import attrgetter

from splitserve.latency.model import LatencyModel
from splitserve.routing.candidate import Candidate, outlooks
from splitserve.routing.outlook import LEAST_TOKENS_TO_MOVE, Outlook, alone_s
from splitserve.routing.route import AS_IT_IS, Need, Route, Split

AHEAD_S = 0.0  # so long before a worker has read its prompts it gets the next one
IN_HAND = 0.3  # of the time that the prompt alone takes: as much is to be left when the first token is out
NEARLY = 0.05  # of the same: routes that take no longer than the soonest and this are as good
BESIDE = 0.05  # what each decode beside a prompt adds to the prompt's cost, as a share
HAND_OVER = 4  # steps of who takes a prompt, that a worker with decodes of its own has read, in the route's cost
DELAY = 0.1  # what a second until the first token adds to a route's cost, in seconds: waiting has its risks

_DECODES = attrgetter("decodes")

# Who reads, and what that means: seconds until it is read, seconds of its time, whether it is busy yet, its decodes.
_Reader = tuple[Candidate, float, float, bool, int]
# Who decodes what another has read: how long a step then is, seconds of its time, until its own prompts are read.
_Target = tuple[Candidate, float, float, float]
# The route's cost in seconds, a number that breaks ties, seconds to the first token, who reads, who decodes.
_Option = tuple[float, int, float, _Reader, Candidate]


def choose_adaptive(candidates: Sequence[Candidate], need: Need, now: float, split: Split = AS_IT_IS) -> Route | None:
    """None if the request is to wait. Every candidate's latency is known."""
    prompt = _PromptTimes(need)
    options, readers, target = _looked_at(candidates, need, prompt, now, split)
    if target is not None and not need.alone and need.tokens >= LEAST_TOKENS_TO_MOVE:
        decode, step_s, decode_cost_s, queue_s = target
        for reader in readers:
            each, read_s, cost_s, _, decodes = reader
            if each is not decode and each.kv_class == decode.kv_class:
                ttft_s = (read_s if read_s > queue_s else queue_s) + step_s
                if decodes:
                    cost_s += HAND_OVER * step_s
                options.append((cost_s + decode_cost_s + DELAY * ttft_s, len(options), ttft_s, reader, decode))
    return _route(_best(options, need.due - now, prompt.least_s))


def _looked_at(
    candidates: Sequence[Candidate], need: Need, prompt: "_PromptTimes", now: float, split: Split
) -> tuple[list[_Option], list[_Reader], _Target | None]:
    """Who may do it all, who may read for another, and the busiest that takes one more decode."""
    tokens, output_tokens, tpot_s, cached = need.tokens, need.output_tokens, need.tpot_s, need.cached
    options: list[_Option] = []
    readers: list[_Reader] = []
    target: _Target | None = None
    best = (False, -1.0)  # of targets so far: whether it should go on to decode, and its step
    looks = outlooks(candidates)
    ending = _ending(candidates, looks, split) if split.keep < 1.0 else ()
    latency, alone_s = None, 0.0
    for each, look in zip(candidates, looks, strict=True):
        if not each.accepting:
            continue
        if each.latency is not latency:
            latency = each.latency
            alone_s = prompt.rest_s(latency, 0)
        prompt_s = alone_s * look.slowdown
        queue_s = each.read_until - now if look.reads and each.read_until > now else 0.0
        ahead_s = AHEAD_S
        if cached and each.info.uuid in cached:
            rest_s = prompt.rest_s(latency, cached[each.info.uuid]) * look.slowdown
            if queue_s <= prompt_s - rest_s:
                prompt_s, ahead_s = rest_s, prompt_s - rest_s
        decodes = look.decodes
        read_s, cost_s = queue_s + prompt_s, prompt_s
        if decodes:
            read_s, cost_s = queue_s + look.read_s(prompt_s), prompt_s * (1.0 + BESIDE * decodes)
        reader = each, read_s, cost_s, queue_s > ahead_s, decodes
        if tokens <= look.starts:
            readers.append(reader)
        context_s = look.context_token_s * tokens
        step_s = look.next_step_s + context_s
        decode_cost_s, goes_on = output_tokens * (look.decode_s + context_s), True
        if decodes:
            if step_s > look.most_step_s or (tpot_s < each.tpot_s and not look.keeps(step_s, tpot_s)):
                continue
            goes_on = id(look) not in ending
            if not goes_on:
                if split.closed:
                    continue
                decode_cost_s += output_tokens * look.first_s / (decodes + 1)
        elif not split.opens:
            if split.closed:
                continue
            decode_cost_s = output_tokens * step_s
        if (decodes or split.opens) and (goes_on, step_s) > best and tokens <= look.parks:
            target, best = (each, step_s, decode_cost_s, queue_s), (goes_on, step_s)
        if tokens <= look.computes and queue_s <= ahead_s:
            options.append((cost_s + decode_cost_s + DELAY * read_s, len(options), read_s, reader, each))
    return options, readers, target


def _ending(candidates: Sequence[Candidate], looks: Sequence[Outlook], split: Split) -> set[int]:
    """Of the outlooks of workers that decode, by `id`, those of workers that should not go on to."""
    decoding = sorted([look for look in looks if look.decodes], key=_DECODES, reverse=True)
    if split.worth:
        worth = {id(look): split.worth.get(id(each.latency), 0.0) for each, look in zip(candidates, looks, strict=True)}
        decoding.sort(key=lambda look: worth[id(look)], reverse=True)
    return set(map(id, decoding[ceil(split.keep * len(decoding)) :]))


class _PromptTimes:
    """What one prompt takes on workers with nothing else to do, worked out once per latency model."""

    def __init__(self, need: Need) -> None:
        self._tokens = need.tokens
        self._part = max(1, need.tokens // 16)
        self._known: dict[tuple[int, int], float] = {}  # by model, and how many tokens are cached

    def rest_s(self, latency: LatencyModel | None, cached: int) -> float:
        """With so many tokens cached, rounded down to a sixteenth of the prompt: who has how much may differ by worker,
        and the model is not asked for each."""
        assert latency is not None
        cached -= cached % self._part
        seconds = self._known.get((id(latency), cached))
        if seconds is None:
            self._known[id(latency), cached] = seconds = alone_s(latency, self._tokens, cached)
        return seconds

    @property
    def least_s(self) -> float:
        """On whichever of them takes least."""
        return min(self._known.values(), default=0.0)


def _best(options: Sequence[_Option], left_s: float, prompt_s: float) -> _Option | None:
    """`prompt_s`: what the prompt takes at least."""
    latest_s = left_s - IN_HAND * prompt_s
    in_time = [option for option in options if option[2] <= latest_s] if prompt_s <= left_s else ()
    if in_time:
        return min(in_time)
    startable = [option for option in options if not option[3][3]]
    if prompt_s > left_s or not startable:  # late whatever is done, it must not cost anyone else more than it has to
        return min(startable, default=None)
    soonest_s = min([option[2] for option in startable])
    latest_s = soonest_s + NEARLY * prompt_s
    if soonest_s <= left_s:
        latest_s = min(latest_s, left_s)
    return min([option for option in startable if option[2] <= latest_s])


def _route(option: _Option | None) -> Route | None:
    if option is None:
        return None
    _, _, ttft_s, (reader, read_s, _, busy, _), decode = option
    if busy:
        return None
    return Route(decode.info.uuid, reader.info.uuid if reader is not decode else None, read_s, ttft_s)
