"""Answers a question: the placement with most of the objective, or why there is none. `hunt` looks, this decides."""

import time

from splitserve.core.errors import ConfigError
from splitserve.planner.deployment import Parallelism, Role
from splitserve.planner.question import Objective, Question
from splitserve.planner.result import PhaseGoodput, SearchResult
from splitserve.planner.search.candidates import Aim, Option, Unfit, options
from splitserve.planner.search.estimate import Estimator
from splitserve.planner.search.hunt import Hunt, Progress
from splitserve.planner.search.infeasible import why
from splitserve.planner.search.judge import adaptive_goodput


def search(
    question: Question, progress: Progress = lambda stage, share: None, *, exhaustive: bool = False
) -> SearchResult:
    """Raises ConfigError for a question that has no answer as it is asked. `progress` gets a stage's name and the share
    that is done. `exhaustive` simulates every candidate as a whole: for tests of what is left out otherwise."""
    began = time.process_time()
    _check(question)
    fit, unfit = options(question)
    hunt = Hunt(Aim(question), fit, progress)
    judged = hunt.everything() if exhaustive else hunt.best()
    simulated, infeasible = hunt.simulated, None
    if not (judged and judged[0].value > 0.0):
        bounds = {option: hunt.estimates.bound(option) for option in fit}
        infeasible, more = why(question, bounds, unfit, judged, progress)
        simulated += more
    adaptive = None
    if infeasible is None:
        progress("adaptive scheduling", 0.95)
        adaptive, more = adaptive_goodput(judged[0], question, hunt.requests)
        simulated += more
    progress("done", 1.0)
    return SearchResult(
        judged=tuple(judged),
        phases=_phases(hunt.estimates, fit, unfit),
        infeasible=infeasible,
        simulated_requests=simulated,
        adaptive_rps=adaptive,
        cpu_s=time.process_time() - began,
    )


def _check(question: Question) -> None:
    slo, rate = question.slo, question.rate_rps
    for name, objective in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s)):
        if not objective > 0.0:
            raise ConfigError(name, f"{objective:g} s can't be met: give a positive number of seconds")
    if not 0.0 < slo.attainment <= 1.0:
        raise ConfigError("attainment", f"{slo.attainment:g} is no share of requests: give one above 0, at most 1")
    if rate is not None and not rate > 0.0:
        raise ConfigError("rate", f"{rate:g} requests/s is no rate: give a positive number")
    if rate is None and question.objective is Objective.FEWEST:
        raise ConfigError("rate", f"{question.objective} needs the rate that must be served")


def _phases(estimates: Estimator, fit: list[Option], unfit: list[Unfit]) -> tuple[PhaseGoodput, ...]:
    """One row a role, kind of GPU and parallelism: colocated with its best chunk."""
    rows: dict[tuple[Role, str, Parallelism], PhaseGoodput] = {}
    for option in fit:
        row = _phase(estimates, option)
        key = (option.role, option.gpu.name, option.parallelism)
        if key not in rows or (row.goodput_rps, row.bound_rps) > (rows[key].goodput_rps, rows[key].bound_rps):
            rows[key] = row
    none = (PhaseGoodput(one.role, one.gpu.name, one.parallelism, 0.0, 0.0, one.reason) for one in unfit)
    return (*rows.values(), *none)


def _phase(estimates: Estimator, option: Option) -> PhaseGoodput:
    bound, goodput = estimates.bound(option), estimates.known(option)
    reason = bound.reason
    if not reason and goodput is None:
        reason = "not simulated: no placement with it could be the best by its bound"
    elif not reason and not goodput:
        reason = "misses the objectives at any rate"
    return PhaseGoodput(option.role, option.gpu.name, option.parallelism, goodput or 0.0, bound.rate_rps, reason)
