"""What one more request would mean to a worker, from its latency model and what it holds. Pure.

Worked out once per change of the worker's load and not per decision, which compares dozens of workers.
"""

from dataclasses import dataclass
from math import inf

from splitserve.latency.model import LatencyModel, Step, StepLatency, pairs
from splitserve.routing.admission import Limits, Room, most_tokens

LEAST_RATE = 0.05  # of full speed: what prompts get beside decodes at least (`slack.STEPS_WITHOUT`)
LEAST_TOKENS_TO_MOVE = 2  # the last token's KV is recomputed where it is decoded: of one token nothing is left to move
FULL, OVERFULL = 0.9, 1.05  # of the TPOT objective: how long a step may become; the more where decodes have slack
AMPLE_SLACK = 10  # in TPOT objectives: from there on a worker may be overfull
FEW, MANY = 8, 16  # decodes, between which a step is taken to grow as it does with many
_TOKENS = 1024  # of the prompt, and of the context, that slopes are taken from


@dataclass(frozen=True, slots=True)
class Outlook:
    """Seconds, and tokens.

    `decodes`: running or promised; `step_s` a decode step of theirs, `next_step_s` with one more, of no tokens yet,
    `first_s` what it takes however few there are, `decode_s` what each of many adds to it, `context_token_s` each token
    that it brings, `most_step_s` how long it may become. `slack_s`: for how long prompts may be read at full speed, and
    `rate` at which share of it after that. `starts`, `parks` and `computes`: of how many tokens at most a prefill, a
    decode that waits for KV, and one that computes its prompt is taken now; below 0: none.
    """

    decodes: int
    step_s: float
    next_step_s: float
    first_s: float
    decode_s: float
    context_token_s: float
    most_step_s: float
    slack_s: float
    rate: float
    slowdown: float
    attainable: bool  # the tightest TPOT objective there, by a request alone
    context: int  # tokens of all decodes
    reads: bool  # prompts, now
    starts: int
    parks: int
    computes: int

    @property
    def is_full(self) -> bool:
        """Whether one more decode like those there would break their objectives."""
        if not self.decodes:
            return False
        return self.next_step_s + self.context_token_s * (self.context // self.decodes) > self.most_step_s

    def keeps(self, step_s: float, tpot_s: float) -> bool:
        """Whether decodes there keep this objective if their steps become so long."""
        return step_s <= _most_step_s(tpot_s, self.slack_s, self.attainable)

    def read_s(self, alone_s: float) -> float:
        """Until a prompt is read that takes so long on this worker with nothing beside it, begun now: the decodes have
        a step under way, and one beside it."""
        begins_s = 2 * self.step_s
        if alone_s <= self.slack_s:
            return begins_s + alone_s
        return begins_s + self.slack_s + (alone_s - self.slack_s) / self.rate


@dataclass(frozen=True, slots=True)
class Held:
    """What an outlook is of, beside the worker's grants: its decodes, the tightest TPOT objective of these, and the
    slack that it said they leave."""

    decodes: int
    tpot_s: float
    slack_s: float


def outlook(
    latency: LatencyModel, slowdown: float, decode_s: float, held: Held, load: Room, limits: Limits, block_size: int
) -> Outlook:
    """`slowdown`: what the worker's steps really take, as a multiple of what the model says; `decode_s`: what the
    function of that name says of the model."""
    decodes = held.decodes
    context = max(0, (limits.total - load.free_blocks) * block_size - load.prefill_tokens)
    step_s = latency.step_s(Step(0, 0, 0, decodes, context)) * slowdown
    next_step_s = latency.step_s(Step(0, 0, 0, decodes + 1, context)) * slowdown
    more_s = latency.step_s(Step(0, 0, 0, decodes + 1, context + _TOKENS)) * slowdown
    decode_s *= slowdown
    context_token_s = (more_s - next_step_s) / _TOKENS
    attainable = latency.step_s(Step(0, 0, 0, 1, 0)) * slowdown < held.tpot_s
    slack_s = max(0.0, held.slack_s)
    starts, parks, computes = most_tokens(load, limits, block_size)
    return Outlook(
        decodes=decodes,
        step_s=step_s,
        next_step_s=next_step_s,
        first_s=max(0.0, step_s - decodes * decode_s - context * context_token_s),
        decode_s=decode_s,
        context_token_s=context_token_s,
        most_step_s=_most_step_s(held.tpot_s, slack_s, attainable),
        slack_s=slack_s,
        rate=max(LEAST_RATE, 1.0 - step_s / held.tpot_s),
        slowdown=slowdown,
        context=context,
        attainable=attainable,
        reads=load.prefill_tokens > 0,
        starts=starts,
        parks=parks,
        computes=computes,
    )


def _most_step_s(tpot_s: float, slack_s: float, attainable: bool) -> float:
    """How long a step may become for decodes with this objective and slack; an objective that no request meets even
    alone bounds nothing."""
    if tpot_s == inf or not attainable:
        return inf
    return tpot_s * (FULL + (OVERFULL - FULL) * min(1.0, slack_s / (AMPLE_SLACK * tpot_s)))


def decode_s(latency: StepLatency, context: float = 0.0) -> float:
    """What each of many decodes with so many tokens adds to a step."""
    few_s, many_s = (latency.step_s(Step(0, 0, 0, count, int(count * context))) for count in (FEW, MANY))
    return (many_s - few_s) / (MANY - FEW)


def alone_s(latency: StepLatency, tokens: int, cached: int = 0) -> float:
    """Of a prompt that has the worker to itself and of which so many tokens need not be computed."""
    left = max(1, tokens - cached)
    return latency.step_s(Step(left, pairs(left, tokens - left), 1, 0, 0))


def prompt_token_s(latency: StepLatency) -> float:
    """Of prompts, one after the other, per token."""
    return alone_s(latency, _TOKENS) / _TOKENS
