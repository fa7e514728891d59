"""Simulates one placement as a whole: its goodput with an interval over seeds, and what breaks first above it."""

from operator import add

from splitserve.core.slo import Slo
from splitserve.latency.model import Provenance, Step, pairs
from splitserve.planner.deployment import Role
from splitserve.planner.question import Question
from splitserve.planner.result import Interval, Judged, Placement
from splitserve.planner.search.candidates import Aim, Candidate, Option
from splitserve.planner.search.goodput import Trials
from splitserve.planner.search.placement import deployment
from splitserve.planner.simulator.outcome import Outcome
from splitserve.workload.workload import Workload

_MOST = 4.0  # times the static goodput: no rate above it is tried
_PART = 0.9  # where the joint bisection starts: both objectives at once cost something


def judge(
    aim: Aim, candidate: Candidate, placement: Placement, guess_rps: float, ceiling_rps: float, requests: int
) -> tuple[Judged, int]:
    """And how many requests that took. No rate above the ceiling is tried: no queue is stable there, whatever a
    simulation that ends says."""
    question = aim.question
    deployed = deployment(question, candidate, placement)
    step, seeds = question.effort.rate_step, question.effort.seeds
    trials = Trials(deployed, question.workload, question.slo, requests, question.seed, ceiling_rps)
    bracket = trials.bracket(_PART * guess_rps, step)
    goodput = trials.goodput(bracket, seeds, step)
    judged = Judged(
        placement=placement,
        deployment=deployed,
        goodput_rps=goodput,
        value=aim.value(candidate, goodput.mean),
        points=trials.points(),
        outcome=trials.outcomes[bracket.low or bracket.high],
        bottleneck=_bottleneck(trials.outcomes[bracket.high], question.slo),
        sources=_sources(candidate, question.workload, goodput.mean, question.slo),
    )
    return judged, trials.simulated


def adaptive_goodput(best: Judged, question: Question, requests: int) -> tuple[Interval, int]:
    """What the same workers serve if the router schedules by the objectives; and how many requests that took."""
    guess_rps = best.goodput_rps.mean
    trials = Trials(
        best.deployment, question.workload, question.slo, requests, question.seed, _MOST * guess_rps, adaptive=True
    )
    step, seeds = question.effort.rate_step, question.effort.seeds
    return trials.goodput(trials.bracket(guess_rps, step), seeds, step), trials.simulated


def _bottleneck(above: Outcome, slo: Slo) -> str:
    """Which objective more requests miss."""
    late = int((above.timelines.ttft_s > slo.ttft_s).sum())
    slow = int((above.timelines.tpot_s > slo.tpot_s).sum())
    return "ttft" if late >= slow else "tpot"


def _sources(candidate: Candidate, workload: Workload, rate_rps: float, slo: Slo) -> tuple[tuple[str, Provenance], ...]:
    """How the latencies of a mean prompt and of a full decode step were known. A colocated worker reads the prompt
    beside its decodes."""
    prefill, decode = candidate.pools[0], candidate.pools[-1]
    prompt, batch = _prompt(prefill[0], workload), _batch(*decode, workload, rate_rps, slo)
    if prefill[0].role is Role.COLOCATED:
        prompt = Step(*map(add, prompt, batch))
    return (
        (str(Role.PREFILL), prefill[0].costs.latency.provenance(prompt)),
        (str(Role.DECODE), decode[0].costs.latency.provenance(batch)),
    )


def _prompt(option: Option, workload: Workload) -> Step:
    tokens = min(int(workload.mean_prompt_tokens), option.chunk_tokens)
    return Step(tokens, pairs(tokens, 0), 1)


def _batch(option: Option, workers: int, workload: Workload, rate_rps: float, slo: Slo) -> Step:
    """By Little's law, each sequence staying as long as the objective lets it."""
    stays_s = workload.mean_output_tokens * slo.tpot_s
    sequences = max(1, int(rate_rps * stays_s / workers / option.costs.latency.stages))
    context = workload.mean_prompt_tokens + workload.mean_output_tokens / 2
    return Step(decodes=sequences, context_tokens=int(sequences * context))
