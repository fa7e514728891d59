"""From what a search found to a plan's figures, and from a plan back to what the simulator serves. Pure."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from splitserve import __version__
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo, Timelines, attainment
from splitserve.latency.model import Trust
from splitserve.planner.deployment import Deployment
from splitserve.planner.explain import why_lost
from splitserve.planner.inputs import Inputs, assumptions, caveats
from splitserve.planner.plan import (
    LINKS_SHOWN,
    Candidate,
    EngineFigures,
    IntervalFigures,
    LengthFigures,
    LinkFigures,
    Parts,
    PhaseFigures,
    PlacementFigures,
    Plan,
    PoolFigures,
    Quantiles,
    RateFigures,
    RoleUse,
    SourceFigures,
    WorkloadFigures,
    rounded,
)  # fmt: skip
from splitserve.planner.question import Question
from splitserve.planner.result import Interval, Judged, PhaseGoodput, Placement, PoolPlacement, SearchResult
from splitserve.planner.search.candidates import Candidate as Counted
from splitserve.planner.search.candidates import Option
from splitserve.planner.search.placement import deployment
from splitserve.planner.simulator.outcome import Outcome, WorkerUse
from splitserve.workload.workload import Workload

SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def plan_of(inputs: Inputs, question: Question, result: SearchResult) -> Plan:
    """Raises AssertionError for a search that found nothing: that has no plan."""
    best = result.best
    assert best is not None
    chosen = _candidate(best, question)
    others = [_candidate(judged, question) for judged in result.judged if judged is not best]
    return Plan(
        splitserve=__version__,
        inputs=inputs,
        chosen=chosen,
        adaptive_rps=interval_of(result.adaptive_rps) if result.adaptive_rps is not None else None,
        runners_up=tuple(other.model_copy(update={"lost": why_lost(chosen, other, inputs)}) for other in others),
        phases=tuple(_phase(phase) for phase in result.phases),
        workload=_workload(question.workload),
        engine=EngineFigures(
            max_model_len=question.max_model_len,
            max_sequences=question.max_sequences,
            block_tokens=question.block_tokens,
        ),
        seeds=question.effort.seeds,
        simulated_requests=result.simulated_requests,
        notes=tuple(dict.fromkeys(_notes(inputs, question, best.placement, chosen))),
    )


def deployment_of(plan: Plan, question: Question) -> Deployment:
    """What the plan's placement is to the simulator. Raises ConfigError if its machines or latencies are no longer what
    they were."""
    pools = plan.chosen.placement.pools
    kinds = {gpu.name: gpu for gpu in question.machines.kinds}
    options = []
    for pool in pools:
        if pool.gpu not in kinds:
            raise ConfigError("placement", f"{pool.gpu} is not among the plan's own GPUs ({question.machines})")
        costs = question.costs(kinds[pool.gpu], pool.parallelism)
        if isinstance(costs, str):
            raise ConfigError("placement", f"{pool}: {costs}")
        options.append((Option(pool.role, kinds[pool.gpu], pool.parallelism, pool.chunk_tokens, costs), pool.workers))
    return deployment(question, Counted(tuple(options)), _placement_of(plan.chosen.placement))


def quantiles(values: npt.NDArray[Any], shares: Iterable[float] = SHARES) -> Quantiles:
    """Each is a value that occurs: the smallest that at least such a share does not exceed (inf is a value)."""
    if not len(values):
        return {}
    ordered = np.sort(values)
    places = [max(int(np.ceil(share * len(ordered))) - 1, 0) for share in shares]
    return {f"p{share * 100:g}": rounded(float(ordered[at])) for share, at in zip(shares, places, strict=True)}


def parts_of(outcome: Outcome, only: npt.NDArray[np.bool_] | None = None) -> Parts:
    """Means over the finished requests. A phase that was skipped (NaN) takes no time."""
    times = np.stack(
        [
            outcome.timelines.arrival,
            outcome.bound,
            outcome.prefill_start,
            outcome.prefill_end,
            outcome.kv_ready,
            outcome.timelines.first_token,
            outcome.timelines.last_token,
        ]
    )
    finished = np.isfinite(outcome.timelines.last_token)
    kept = times[:, finished if only is None else finished & only]
    spent = np.diff(np.fmax.accumulate(kept, axis=0), axis=0)
    means = spent.mean(axis=1) if spent.shape[1] else np.zeros(len(spent))
    return Parts(**dict(zip(Parts.model_fields, map(rounded, means.tolist()), strict=True)))


def met(lines: Timelines, slo: Slo) -> dict[str, float]:
    """Which shares of requests are within each objective, and within both."""
    return {
        "ttft_met": rounded(attainment(lines, Slo(slo.ttft_s, np.inf))),
        "tpot_met": rounded(attainment(lines, Slo(np.inf, slo.tpot_s))),
        "both_met": rounded(attainment(lines, slo)),
    }


def interval_of(interval: Interval) -> IntervalFigures:
    return IntervalFigures(mean=rounded(interval.mean), low=rounded(interval.low), high=rounded(interval.high))


def use_of(workers: Iterable[WorkerUse]) -> tuple[RoleUse, ...]:
    by_role: dict[str, list[WorkerUse]] = {}
    for worker in workers:
        by_role.setdefault(worker.role, []).append(worker)
    return tuple(
        RoleUse(
            role=role,
            workers=len(same),
            busy_mean=rounded(float(np.mean([worker.busy_share for worker in same]))),
            busy_most=rounded(max(worker.busy_share for worker in same)),
            kv_peak=rounded(max(worker.peak_kv_share for worker in same)),
            preemptions=sum(worker.preemptions for worker in same),
        )
        for role, same in by_role.items()
    )


def links_of(outcome: Outcome) -> tuple[LinkFigures, ...]:
    busiest = sorted(outcome.links, key=lambda link: (-link.busy_share, link.name))[:LINKS_SHOWN]
    return tuple(
        LinkFigures(name=link.name, carried_bytes=rounded(link.carried_bytes), busy_share=rounded(link.busy_share))
        for link in busiest
    )


def _placement_of(figures: PlacementFigures) -> Placement:
    pools = tuple(
        PoolPlacement(pool.role, pool.gpu, pool.parallelism, pool.nodes, pool.chunk_tokens) for pool in figures.pools
    )
    return Placement(pools, figures.affinity, figures.cost_per_hour, figures.watts)


def _candidate(judged: Judged, question: Question) -> Candidate:
    outcome, slo, goodput = judged.outcome, question.slo, judged.goodput_rps.mean
    lines = outcome.timelines
    watts, cost = judged.placement.watts, judged.placement.cost_per_hour
    slowest = lines.ttft_s >= np.quantile(lines.ttft_s, 0.9, method="inverted_cdf") if len(lines) else None
    return Candidate(
        placement=_placement(judged.placement),
        goodput_rps=interval_of(judged.goodput_rps),
        goodput_per_gpu=rounded(judged.goodput_per_gpu),
        goodput_per_cost=rounded(goodput / cost) if cost else None,
        goodput_per_kilowatt=rounded(goodput / watts * 1000) if watts else None,
        bottleneck=judged.bottleneck,
        attainment=tuple(
            RateFigures(rate_rps=rounded(point.rate_rps), **interval_of(point.attainment).model_dump())
            for point in sorted(judged.points, key=lambda point: point.rate_rps)
        ),
        ttft_s=quantiles(lines.ttft_s),
        tpot_s=quantiles(lines.tpot_s),
        **met(lines, slo),
        parts=parts_of(outcome),
        slowest_parts=parts_of(outcome, slowest),
        use=use_of(outcome.workers),
        links=links_of(outcome),
        latencies=tuple(
            SourceFigures(phase=phase, trust=known.trust, source=known.source, error=known.error)
            for phase, known in judged.sources
        ),
    )


def _placement(placement: Placement) -> PlacementFigures:
    pools = [
        PoolFigures(
            role=pool.role,
            gpu=pool.gpu,
            tp=pool.parallelism.tp,
            pp=pool.parallelism.pp,
            workers=pool.workers,
            chunk_tokens=pool.chunk_tokens,
            nodes=pool.nodes,
        )
        for pool in placement.pools
    ]
    return PlacementFigures(
        affinity=placement.affinity,
        gpus=placement.gpus,
        cost_per_hour=rounded(placement.cost_per_hour),
        watts=rounded(placement.watts),
        pools=tuple(pools),
    )


def _phase(phase: PhaseGoodput) -> PhaseFigures:
    return PhaseFigures(
        role=phase.role,
        gpu=phase.gpu,
        tp=phase.parallelism.tp,
        pp=phase.parallelism.pp,
        goodput_rps=rounded(phase.goodput_rps),
        goodput_per_gpu=rounded(phase.per_gpu),
        reason=phase.reason,
    )


def _workload(workload: Workload) -> WorkloadFigures:
    summary = workload.describe()
    prompt, output = (
        LengthFigures(**{key: rounded(value) for key, value in asdict(lengths).items()})
        for lengths in (summary.prompt, summary.output)
    )
    return WorkloadFigures(
        name=workload.name, prompt=prompt, output=output, prefix_hit=rounded(summary.prefix_hit), notes=workload.notes
    )


def _notes(inputs: Inputs, question: Question, placement: Placement, chosen: Candidate) -> Iterable[str]:
    yield from assumptions(inputs)
    yield from question.workload.notes
    yield from _flags(chosen)
    kinds = {gpu.name: gpu for gpu in question.machines.kinds}
    for pool in placement.pools:
        yield from caveats(inputs, question.model, kinds[pool.gpu], pool.parallelism)


def _flags(chosen: Candidate) -> Iterable[str]:
    """What should make a reader careful."""
    for source in chosen.latencies:
        if source.trust in (Trust.EXTRAPOLATED, Trust.ANALYTIC):
            error = (
                "nobody knows their error" if source.error is None else f"their held-out error is {source.error:.1%}"
            )
            where = f"{source.phase} latencies are {source.trust} ({source.source})"
            yield f"{where}; {error}: measure with `splitserve profile`"
