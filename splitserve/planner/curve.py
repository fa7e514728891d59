"""Attainment against rate, of the placements that a report draws: the search itself looks only near the goodput."""

from collections.abc import Callable
from dataclasses import replace

from splitserve.core.slo import attainment
from splitserve.planner.question import Question
from splitserve.planner.result import Interval, Judged, RatePoint, SearchResult
from splitserve.planner.search.goodput import interval
from splitserve.planner.simulator.simulate import simulate

_REQUESTS, _FEWEST_SEEDS = 50_000, 4  # of one curve: more seeds are not worth waiting for
SHARES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)  # of the goodput


def with_curves(
    question: Question, result: SearchResult, progress: Callable[[str, float], None] = lambda doing, share: None
) -> SearchResult:
    """The same result; the best placement, and the best of the other kind, have points all along, over several
    seeds."""
    drawn = [index for index in _drawn(result) if result.judged[index].goodput_rps.mean]
    judged = list(result.judged)
    for nth, index in enumerate(drawn):
        progress(f"simulating rates around goodput {nth + 1} of {len(drawn)}", nth / len(drawn))
        judged[index] = _with_curve(question, judged[index])
    return replace(result, judged=tuple(judged))


def _drawn(result: SearchResult) -> list[int]:
    kinds = [judged.placement.colocated for judged in result.judged]
    return [kinds.index(kind) for kind in (kinds[0], not kinds[0]) if kind in kinds] if kinds else []


def _with_curve(question: Question, judged: Judged) -> Judged:
    """As many requests as the simulation behind the outcome had."""
    count = len(judged.outcome.timelines)
    seeds = min(question.effort.seeds, max(_FEWEST_SEEDS, _REQUESTS // (count * len(SHARES))))
    rates = [share * judged.goodput_rps.mean for share in SHARES]
    points = [RatePoint(rate_rps, _attainment(question, judged, rate_rps, count, seeds)) for rate_rps in rates]
    return replace(judged, points=tuple(points))


def _attainment(question: Question, judged: Judged, rate_rps: float, count: int, seeds: int) -> Interval:
    met = []
    for seed in range(question.seed, question.seed + seeds):
        outcome = simulate(judged.deployment, question.workload.draw(count, rate_rps, seed), seed)
        met.append(attainment(outcome.timelines, question.slo))
    found = interval(met)
    return Interval(found.mean, max(found.low, 0.0), min(found.high, 1.0))
