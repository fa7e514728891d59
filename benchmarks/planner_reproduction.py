"""Holds the planner against DistServe's published placements for ShareGPT, and measures what a search costs.

    python -m benchmarks.planner_reproduction [--json] [--spreads 0.8,1.0,1.2,1.4]

DistServe (OSDI'24, arXiv:2401.09670, Table 3) serves OPT-13B with prefill TP2 and decode TP1, OPT-66B with prefill TP4
and decode TP2 PP2, on A100-80G. Lengths are synthetic: ShareGPT's published means with lognormal spreads, so the result
is shown over a range of those. Two ways to count:

- theirs: the prefill worker makes the first token, one worker of each role. What their search would find with our
  simulator, over every pair of workers that the GPUs hold.
- ours: the decode worker makes the first token, so time to first token has a decode step in it; any number of workers,
  colocated ones too. What `splitserve plan` answers.

Steps are how many search steps (5% each) the published plan lies below the best separated one: in goodput per GPU, and
in goodput among those with no more GPUs than it has.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from math import log

import numpy as np
from rich.console import Console
from rich.table import Table

from splitserve.core.slo import attainment
from splitserve.latency.model import Step, pairs
from splitserve.planner.deployment import Deployment, Parallelism, Role
from splitserve.planner.inputs import Inputs, resolve
from splitserve.planner.question import Question
from splitserve.planner.result import Judged
from splitserve.planner.search.candidates import Aim, Candidate, Option, options
from splitserve.planner.search.demand import Demand, enough
from splitserve.planner.search.estimate import Estimator
from splitserve.planner.search.goodput import highest
from splitserve.planner.search.judge import judge
from splitserve.planner.search.placement import deployment, place
from splitserve.planner.search.search import search
from splitserve.planner.simulator.simulate import simulate

Plan = tuple[Parallelism, Parallelism]  # of prefill and decode


@dataclass(frozen=True, slots=True)
class Case:
    """One published plan, on one node of so many GPUs (several of eight, if more)."""

    model: str
    gpus: int
    ttft_s: float
    tpot_s: float
    plan: Plan


_13B, _66B = (Parallelism(2), Parallelism(1)), (Parallelism(4), Parallelism(2, 2))
CASES = (
    Case("opt-13b", 3, 0.25, 0.1, _13B),  # the paper's objectives, the plan's GPUs
    Case("opt-13b", 4, 0.2, 0.1, _13B),  # their repository's example: 1.56 requests/s and GPU
    Case("opt-66b", 8, 0.4, 0.1, _66B),
)
_WHERE = ("model", "SLO, s", "GPUs", "spread", "P90 prompt, alone s")
_LAST = ("best of all", "CPU s")
LARGE = Case("opt-66b", 32, 0.4, 0.1, _66B)


@dataclass(frozen=True, slots=True)
class Found:
    """A plan's name, its GPUs and what it serves."""

    name: str
    gpus: int
    goodput_rps: float

    @property
    def per_gpu(self) -> float:
        return self.goodput_rps / self.gpus


@dataclass(frozen=True, slots=True)
class Row:
    """Of one case, workload and way to count."""

    case: Case
    spread: float
    counted: str
    p90_prompt_tokens: int
    p90_alone_s: float  # that prompt on the published prefill worker, idle
    published: Found
    per_gpu: Found  # the best separated plan by goodput per GPU
    total: Found  # and by goodput, of those with at most the published plan's GPUs
    best: Found
    step: float
    cpu_s: float

    @property
    def steps_per_gpu(self) -> float:
        return self._steps(self.per_gpu.per_gpu, self.published.per_gpu)

    @property
    def steps(self) -> float:
        return self._steps(self.total.goodput_rps, self.published.goodput_rps)

    def _steps(self, best: float, published: float) -> float:
        return log(best / published) / log(1 + self.step) if published else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--spreads", default="0.8,1.0,1.2,1.4", help="of the lengths' logarithm, separated by commas")
    given = parser.parse_args()
    spreads = [float(spread) for spread in given.spreads.split(",")]
    rows = [row for case in CASES for spread in spreads for row in (theirs(case, spread), ours(case, spread))]
    large = search(question_of(LARGE, 1.0)).cpu_s
    if given.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "four_nodes_cpu_s": large}))
        return
    for counted in ("theirs", "ours"):
        print_table(counted, [row for row in rows if row.counted == counted])
    print(f"opt-66b on 4 nodes of 8: {large:.1f} CPU s")


def question_of(case: Case, spread: float) -> Question:
    nodes, gpus = max(1, case.gpus // 8), min(case.gpus, 8)
    return resolve(
        Inputs(
            model=case.model,
            gpus=f"a100-80g:{nodes}x{gpus}",
            link="25Gb/s",
            ttft=case.ttft_s,
            tpot=case.tpot_s,
            workload=f"sharegpt:spread={spread:g}",
            source="distserve",
        )
    )


def theirs(case: Case, spread: float) -> Row:
    """Every pair of one prefill and one decode worker, the first token being the prefill worker's."""
    question, began = question_of(case, spread), time.process_time()
    estimates = Estimator(_demand(question), question.slo, question.max_sequences, question.effort.rate_step)
    found = {
        _plan(pair): Found(_named(pair), pair.gpus, _their_goodput(question, pair, estimates))
        for pair in _pairs(question)
        if pair.gpus <= case.gpus
    }
    return _row(case, spread, "theirs", found[case.plan], list(found.values()), time.process_time() - began)


def ours(case: Case, spread: float) -> Row:
    """What the search answers, and the published plan judged in the same way."""
    question = question_of(case, spread)
    result = search(question)
    published = _found(_published(question, case))
    separated = [_found(judged) for judged in result.judged if not judged.placement.colocated]
    row = _row(case, spread, "ours", published, [*separated, published], result.cpu_s)
    return replace(row, best=_found(result.judged[0]))


def _published(question: Question, case: Case) -> Judged:
    candidate = next(pair for pair in _pairs(question) if _plan(pair) == case.plan)
    placement = place(question, candidate, 1.0)
    assert placement is not None
    estimates = Estimator(_demand(question), question.slo, question.max_sequences, question.effort.rate_step)
    ceiling = min(estimates.bound(option).rate_rps for option, _ in candidate.pools)
    return judge(Aim(question), candidate, placement, ceiling / 2, ceiling, question.effort.requests)[0]


def _their_goodput(question: Question, candidate: Candidate, estimates: Estimator) -> float:
    ceiling = min(estimates.bound(option).rate_rps for option, _ in candidate.pools)
    placement = place(question, candidate, ceiling)
    if not ceiling or placement is None:
        return 0.0
    deployed = deployment(question, candidate, placement)
    guess = min(estimates.phase(option) for option, _ in candidate.pools) or ceiling / 2
    found = highest(
        lambda rate_rps: _their_attainment(question, deployed, rate_rps) >= question.slo.attainment,
        guess,
        ceiling,
        question.effort.rate_step,
    )
    return found.low


def _their_attainment(question: Question, deployed: Deployment, rate_rps: float) -> float:
    drawn = question.workload.draw(question.effort.requests, rate_rps, question.seed)
    outcome = simulate(deployed, drawn, question.seed)
    first = np.where(np.isfinite(outcome.prefill_end), outcome.prefill_end, np.inf)
    return attainment(replace(outcome.timelines, first_token=first), question.slo)


def _pairs(question: Question) -> list[Candidate]:
    fit, _ = options(question)
    by_role: dict[Role, list[Option]] = {role: [option for option in fit if option.role is role] for role in Role}
    return [Candidate(((p, 1), (d, 1))) for p in by_role[Role.PREFILL] for d in by_role[Role.DECODE]]


def _plan(candidate: Candidate) -> Plan:
    prefill, decode = (option.parallelism for option, _ in candidate.pools)
    return prefill, decode


def _demand(question: Question) -> Demand:
    return Demand.of(question.workload.draw(question.effort.requests, 1.0, question.seed))


def _row(case: Case, spread: float, counted: str, published: Found, separated: list[Found], cpu_s: float) -> Row:
    question = question_of(case, spread)
    demand = _demand(question)
    tokens = sorted(demand.prompt)[enough(question.slo.attainment, len(demand)) - 1]
    costs = question.costs(question.machines.kinds[0], case.plan[0])
    assert not isinstance(costs, str)
    per_gpu = max(separated, key=lambda found: found.per_gpu)
    as_large = [found for found in separated if found.gpus <= published.gpus]
    return Row(
        case=case,
        spread=spread,
        counted=counted,
        p90_prompt_tokens=tokens,
        p90_alone_s=costs.latency.step_s(Step(tokens, pairs(tokens, 0), 1)),
        published=published,
        per_gpu=per_gpu,
        total=max(as_large, key=lambda found: found.goodput_rps),
        best=per_gpu,
        step=question.effort.rate_step,
        cpu_s=cpu_s,
    )


def _found(judged: Judged) -> Found:
    name = str(judged.placement)
    for long, short in ((" on a100-80g", ""), ("prefill", "P"), ("decode", "D"), ("colocated", "both")):
        name = name.replace(long, short)
    return Found(name, judged.placement.gpus, judged.goodput_rps.mean)


def _named(pair: Candidate) -> str:
    return " + ".join(f"{letter} {option.parallelism}" for letter, (option, _) in zip("PD", pair.pools, strict=True))


def print_table(counted: str, rows: list[Row]) -> None:
    table = Table(title=f"First token counted as {counted}; goodput in requests/s and GPU (requests/s)")
    for heading in (*_WHERE, "published", "best separated, by GPU", "steps", "of no more GPUs", "steps", *_LAST):
        table.add_column(heading, no_wrap=True)
    for r in rows:
        case, prompt = r.case, f"{r.p90_prompt_tokens} {r.p90_alone_s:.3f}"
        where = (case.model, f"{case.ttft_s:g}/{case.tpot_s:g}", str(case.gpus), f"{r.spread:g}", prompt)
        compared = (_cell(r.per_gpu), f"{r.steps_per_gpu:.1f}", _cell(r.total), f"{r.steps:.1f}", _cell(r.best))
        goodput = f"{r.published.per_gpu:.2f} ({r.published.goodput_rps:.1f})"
        table.add_row(*where, goodput, *compared, f"{r.cpu_s:.1f}")
    Console(width=215).print(table)


def _cell(found: Found) -> str:
    return f"{found.name} {found.per_gpu:.2f} ({found.goodput_rps:.1f})"


if __name__ == "__main__":
    main()
