"""A placement simulated at one rate, over several seeds: what `splitserve simulate` shows."""

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import Field

from splitserve.core.config import Settings
from splitserve.core.slo import Slo, Timelines, attainment
from splitserve.planner.deployment import Deployment
from splitserve.planner.plan import IntervalFigures, LinkFigures, Parts, Quantiles, RoleUse, rounded
from splitserve.planner.planned import interval_of, links_of, met, parts_of, quantiles, use_of
from splitserve.planner.question import Question
from splitserve.planner.search.goodput import interval
from splitserve.planner.simulator.outcome import Outcome
from splitserve.planner.simulator.simulate import simulate


class Trial(Settings):
    """Attainment with its interval over seeds. Quantiles are of all seeds' requests, the rest is the first seed's."""

    workload: str
    rate_rps: float
    requests: int = Field(description="of all seeds together")
    seeds: int
    both_met: IntervalFigures
    ttft_met: float
    tpot_met: float
    ttft_s: Quantiles
    tpot_s: Quantiles
    parts: Parts
    use: tuple[RoleUse, ...]
    links: tuple[LinkFigures, ...]


def tried(
    deployment: Deployment,
    question: Question,
    rate_rps: float,
    requests: int,
    seeds: int,
    progress: Callable[[str, float], None] = lambda doing, share: None,
) -> Trial:
    """Seeds go on from the question's."""
    outcomes: list[Outcome] = []
    for nth in range(seeds):
        progress(f"simulating seed {nth + 1} of {seeds}", nth / seeds)
        seed = question.seed + nth
        outcomes.append(simulate(deployment, question.workload.draw(requests, rate_rps, seed), seed))
    return trial_of(outcomes, question.slo, question.workload.name, rate_rps)


def trial_of(outcomes: Sequence[Outcome], slo: Slo, workload: str, rate_rps: float) -> Trial:
    """Of at least one simulation of the same placement and rate."""
    lines = _joined([outcome.timelines for outcome in outcomes])
    first = outcomes[0]
    shares = met(lines, slo)
    return Trial(
        workload=workload,
        rate_rps=rounded(rate_rps),
        requests=len(lines),
        seeds=len(outcomes),
        both_met=interval_of(interval([attainment(outcome.timelines, slo) for outcome in outcomes])),
        ttft_met=shares["ttft_met"],
        tpot_met=shares["tpot_met"],
        ttft_s=quantiles(lines.ttft_s),
        tpot_s=quantiles(lines.tpot_s),
        parts=parts_of(first),
        use=use_of(first.workers),
        links=links_of(first),
    )


def _joined(all_lines: Sequence[Timelines]) -> Timelines:
    return Timelines(
        np.concatenate([lines.arrival for lines in all_lines]),
        np.concatenate([lines.first_token for lines in all_lines]),
        np.concatenate([lines.last_token for lines in all_lines]),
        np.concatenate([lines.output_tokens for lines in all_lines]),
    )
