"""How many prompt tokens a step may compute beside decodes, so that each of those keeps its TPOT objective. Pure.

The first token of a decode came out at some moment; its n-th one after that is due n * TPOT later. A decode that has
been faster than its objective has time to spare, and if its steps are shorter than its objective it will have more by
the end of its output. How long outputs are is known of those that ended lately. What of all that can be spent at once,
without most outputs ending too soon to make up for it, is the decode's *slack*, less a few tokens' time that is kept in
hand; a worker's is the least of its decodes'. In that time prompts may be read, in one large chunk or in many small
ones.

It is not a scheduler: an engine asks before each step, and so does the planner's simulated worker.
"""

from splitserve.latency.model import Step, StepLatency, pairs
from splitserve.routing.lengths import OutputLengths

LEAST_CHUNK = 32  # prompt tokens worth a step's extra work
TIMES_THE_START = 6  # times what a chunk costs however short it is: so much its tokens are to cost
STEPS_WITHOUT = 16  # so many steps in a row may compute none: a prompt goes on however late the decodes are
TOKENS_IN_HAND = 4  # of a decode's time, since what a step takes is only predicted
ITL_MARGIN = 0.95  # of ITL objectives, for the same reason
TOO_SHORT = 0.1  # share of outputs that may end before they have made up for a prompt
URGENT_TOO_SHORT = 0.5  # for a prompt that would be late otherwise: then one request's objective stands against another


def slack_of(
    since_first_s: float, made: int, tpot_s: float, step_s: float, lengths: OutputLengths, share: float, running: int
) -> float:
    """Of one decode, in seconds: its first token came out so long ago, `made` are out by now, a step without prompts
    takes `step_s`. All but a `share` of the outputs that are longer than this one is now will still keep `tpot_s`.
    `running`: tokens made by all outputs that have not ended."""
    spare_s = tpot_s - step_s
    to_come = lengths.to_come(made, share, running) if spare_s > 0.0 else 0
    return due_in_s(since_first_s, made, tpot_s) + to_come * spare_s


def due_in_s(since_first_s: float, made: int, tpot_s: float) -> float:
    """Until that decode's next token is due, whatever is still to come, but for what is kept in hand."""
    return (made - TOKENS_IN_HAND) * tpot_s - since_first_s


def is_urgent(left_s: float, alone_s: float, tpot_s: float) -> bool:
    """Whether a prompt that needs so long at full speed is late if it gets less, and is not late anyhow. `left_s`:
    until its first token is due."""
    return alone_s <= left_s < 1.5 * alone_s + tpot_s


def least_chunk(latency: StepLatency) -> int:
    """Prompt tokens that a step computes at least, if any, beside decodes: in smaller chunks a prompt would take much
    more of the worker's time."""
    step_s, one_s, more_s = (
        latency.step_s(Step(tokens, pairs(tokens, 0), min(tokens, 1), 1, 0)) for tokens in (0, 1, 257)
    )
    token_s = (more_s - one_s) / 256
    if token_s <= 0.0:
        return LEAST_CHUNK
    start_s = one_s - token_s - step_s
    return max(LEAST_CHUNK, int(TIMES_THE_START * start_s / token_s))


def chunk_within(
    latency: StepLatency, slack_s: float, decodes: int, context: int, done: int, most: int, least: int = LEAST_CHUNK
) -> int:
    """The most prompt tokens, up to `most`, that a step can compute in that time beside decodes that read so many
    tokens of context. `done` of the prompt are computed already. 0 if fewer than `least` fit."""
    if most <= 0 or _step_s(latency, most, decodes, context, done) <= slack_s:
        return most
    least = min(least, most)
    if _step_s(latency, least, decodes, context, done) > slack_s:
        return 0
    fits, too_many = least, most
    while too_many - fits > fits // 16 + 1:
        between = (fits + too_many) // 2
        if _step_s(latency, between, decodes, context, done) <= slack_s:
            fits = between
        else:
            too_many = between
    return fits


def _step_s(latency: StepLatency, tokens: int, decodes: int, context: int, done: int) -> float:
    return latency.step_s(Step(tokens, pairs(tokens, done), 1, decodes, context))
