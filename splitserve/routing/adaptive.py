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
too; a worker that has no decodes at all always takes one.
"""

from collections.abc import Sequence

from splitserve.routing.fleet import Candidate
from splitserve.routing.outlook import LEAST_TOKENS_TO_MOVE, Outlook, alone_s
from splitserve.routing.route import Need, Route

AHEAD_S = 0.0  # so long before a worker has read its prompts it gets the next one
IN_HAND = 0.3  # of the time that the prompt alone takes: as much is to be left when the first token is out
NEARLY = 0.05  # of the same: routes that take no longer than the soonest and this are as good
BESIDE = 0.05  # what each decode beside a prompt adds to the prompt's cost, as a share
DELAY = 0.1  # what a second until the first token adds to a route's cost, in seconds: waiting has its risks
FULL, OVERFULL = 0.9, 1.2  # of the TPOT objective: how long a step may become; the more where decodes have slack
AMPLE_SLACK = 10  # in TPOT objectives: from there on a worker may be overfull

# Seconds to the first token, seconds of workers' time, a number that breaks ties, whether the reader is busy yet, who
# reads and for how long, who decodes.
_Option = tuple[float, float, int, bool, Candidate, float, Candidate]


def choose_adaptive(candidates: Sequence[Candidate], need: Need, now: float) -> Route | None:
    """None if the request is to wait. Every candidate's latency is known."""
    tokens, left_s = need.tokens, need.due - now
    options: list[_Option] = []  # so far without who decodes: each for itself
    readers: list[_Option] = []
    alone: dict[int, float] = {}  # seconds of the prompt, by latency model
    target: Candidate | None = None
    target_step_s = target_cost_s = target_queue_s = 0.0
    for number, each in enumerate(candidates):
        if not each.accepting:
            continue
        look = each.outlook
        prompt_s = alone.get(id(each.latency), 0.0) or _alone_s(each, tokens, alone)
        prompt_s *= look.slowdown
        queue_s = each.read_until - now if each.load.prefill_tokens and each.read_until > now else 0.0
        read_s = queue_s + look.read_s(prompt_s)
        cost_s = prompt_s * (1.0 + BESIDE * look.decodes)
        busy = queue_s > AHEAD_S
        if tokens <= look.starts:
            readers.append((read_s, cost_s, number, busy, each, read_s, each))
        step_s = look.step_with_s(tokens)
        if look.decodes and not _has_room(look, step_s, min(need.tpot_s, each.tpot_s)):
            continue
        decode_cost_s = need.output_tokens * (step_s - look.step_s)
        if look.decodes and step_s > target_step_s and tokens <= look.parks:
            target, target_step_s, target_cost_s, target_queue_s = each, step_s, decode_cost_s, queue_s
        if not busy and tokens <= look.computes:
            options.append((read_s, cost_s + decode_cost_s, number, False, each, read_s, each))
    if target is not None and not need.alone and tokens >= LEAST_TOKENS_TO_MOVE:
        options += [
            (
                max(read_s, target_queue_s) + target_step_s,
                cost_s + target_cost_s,
                len(candidates) + number,
                busy,
                reader,
                read_s,
                target,
            )
            for _, cost_s, number, busy, reader, read_s, _ in readers
            if reader is not target and reader.kv_class == target.kv_class
        ]
    return _route(_best(options, left_s, min(alone.values(), default=0.0)))


def _best(options: Sequence[_Option], left_s: float, prompt_s: float) -> _Option | None:
    """`prompt_s`: what the prompt takes at least."""
    startable = [option for option in options if not option[3]]
    if prompt_s > left_s:  # it is late whatever is done: it must not cost anyone else more than it has to
        return min(startable, key=_cost_s, default=None)
    in_time = [option for option in options if option[0] <= left_s - IN_HAND * prompt_s]
    if in_time or not startable:
        return min(in_time, key=_cost_s, default=None)
    soonest_s = min(option[0] for option in startable)
    latest_s = soonest_s + NEARLY * prompt_s
    if soonest_s <= left_s:
        latest_s = min(latest_s, left_s)
    return min((option for option in startable if option[0] <= latest_s), key=_cost_s)


def _cost_s(option: _Option) -> tuple[float, int]:
    return option[1] + DELAY * option[0], option[2]


def _route(option: _Option | None) -> Route | None:
    if option is None or option[3]:
        return None
    ttft_s, _, _, _, reader, read_s, decode = option
    return Route(decode.info.uuid, reader.info.uuid if reader is not decode else None, read_s, ttft_s)


def _alone_s(candidate: Candidate, tokens: int, known: dict[int, float]) -> float:
    assert candidate.latency is not None
    known[id(candidate.latency)] = seconds = alone_s(candidate.latency, tokens)
    return seconds


def _has_room(look: Outlook, step_s: float, tpot_s: float) -> bool:
    """Whether decodes there keep their objective with one more."""
    if step_s <= FULL * tpot_s or not look.attainable:
        return True
    return step_s <= tpot_s * (FULL + (OVERFULL - FULL) * min(1.0, look.slack_s / (AMPLE_SLACK * tpot_s)))
