"""Does live traffic still look like what was planned for, and what would a new plan change? Decisions only.

It reads the router's Prometheus text and compares; fetching it, waiting and printing are the command line's. Counters
only grow, so that two readings make a window.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf, isfinite

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from splitserve.core.errors import ConfigError
from splitserve.planner.inputs import Inputs
from splitserve.planner.plan import Plan, rounded
from splitserve.workload.drift import Histogram, Tolerance, Traffic, counts_of, drift
from splitserve.workload.workload import Quantiles, Summary

PROMPT_TOKENS = "splitserve_request_prompt_tokens"
OUTPUT_TOKENS = "splitserve_request_output_tokens"
REQUESTS = "splitserve_requests_total"
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Reading:
    """One scrape of a router, counted from its start; `at_s` on any clock that only goes forward."""

    at_s: float
    requests: float
    prompt: Histogram
    output: Histogram


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reasons` say what has drifted, each a sentence; none means that the plan still stands. `enough`: whether there
    were requests enough to judge lengths by."""

    rate_rps: float
    reasons: tuple[str, ...]
    enough: bool

    @property
    def drifted(self) -> bool:
        return bool(self.reasons)

    @property
    def sentence(self) -> str:
        if self.drifted:
            return f"drifted: {self.rate_rps:.3g} requests/s now"
        known = "lengths as planned" if self.enough else "too few requests yet to judge their lengths"
        return f"as planned: {self.rate_rps:.3g} requests/s, {known}"


@dataclass(frozen=True, slots=True)
class Change:
    """From one placement to another: lines of a diff ("+ ", "- " or "  "), and workers that only change their role."""

    lines: tuple[str, ...]
    role_flips: int

    @property
    def empty(self) -> bool:
        return all(line.startswith("  ") for line in self.lines)


def reading(text: str, at_s: float, source: str) -> Reading:
    """Of a router's metrics. Raises ConfigError (`source` begins it) if it is no such text or lacks a metric."""
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError as error:
        raise ConfigError(source, f"not Prometheus text: {error}") from error
    requests = [sample.value for sample in samples if sample.name == REQUESTS]
    buckets = {
        name: [(float(each.labels["le"]), each.value) for each in samples if each.name == f"{name}_bucket"]
        for name in (PROMPT_TOKENS, OUTPUT_TOKENS)
    }
    for name, found in buckets.items():
        if not found:
            raise ConfigError(source, f"has no {name}; give the metrics address of a splitserve router (--metrics)")
    return Reading(at_s, sum(requests), _histogram(buckets[PROMPT_TOKENS]), _histogram(buckets[OUTPUT_TOKENS]))


def window(older: Reading, newer: Reading) -> Traffic | None:
    """What came between two readings; None if no time has passed or the router was started anew in between."""
    seconds = newer.at_s - older.at_s
    same_buckets = older.prompt.bounds == newer.prompt.bounds and older.output.bounds == newer.output.bounds
    if seconds <= 0 or newer.requests < older.requests or not same_buckets:
        return None
    if newer.prompt.total < older.prompt.total or newer.output.total < older.output.total:
        return None
    prompt, output = _since(older.prompt, newer.prompt), _since(older.output, newer.output)
    return Traffic((newer.requests - older.requests) / seconds, prompt, output)


def planned_summary(plan: Plan) -> Summary:
    """The lengths that were planned for."""
    workload = plan.workload
    prompt, output = (Quantiles(**side.model_dump()) for side in (workload.prompt, workload.output))
    return Summary(0, prompt, output, prefix_hit=workload.prefix_hit)


def planned_rate_rps(plan: Plan) -> float:
    """The rate that was asked for; without one, the most that the plan serves."""
    return plan.inputs.rate or plan.chosen.goodput_rps.mean


def judge(plan: Plan, seen: Traffic, tolerance: Tolerance | None = None) -> Verdict:
    """Lengths against the plan's. The rate against the one asked for; where none was, only what is beyond the plan's
    goodput counts."""
    tolerance = tolerance or Tolerance()
    goodput = plan.chosen.goodput_rps.mean
    rate_counts = tolerance if plan.inputs.rate else replace(tolerance, rate=inf)
    found = drift(planned_summary(plan), planned_rate_rps(plan), seen, rate_counts)
    beyond = seen.rate_rps > goodput
    reasons = (f"{seen.rate_rps:.3g} requests/s are more than the plan's goodput, {goodput:.3g}",) if beyond else ()
    enough = found.prompt is not None and found.output is not None
    return Verdict(seen.rate_rps, (*reasons, *found.reasons), enough)


def observed_inputs(plan: Plan, seen: Traffic, tolerance: Tolerance | None = None) -> Inputs:
    """The plan's question with the traffic that was seen. Lengths of which there were too few stay as planned; the rate
    becomes one that must be served where one was asked for, or where the plan can't serve it."""
    tolerance = tolerance or Tolerance()
    changed: dict[str, object] = {}
    if min(seen.prompt.total, seen.output.total) >= tolerance.requests:
        changed["workload"] = workload_spec(seen)
    if plan.inputs.rate or seen.rate_rps > plan.chosen.goodput_rps.mean:
        changed["rate"] = rounded(seen.rate_rps)
    return plan.inputs.model_copy(update=changed)


def workload_spec(seen: Traffic) -> str:
    """The lengths that were seen, by their quantiles, as `--workload` takes them."""
    return ",".join(
        f"{side}:{_quantiles(lengths)}" for side, lengths in (("prompt", seen.prompt), ("output", seen.output))
    )


def change(before: Plan, after: Plan) -> Change:
    """What applying `after` means where `before` runs."""
    old, new = _by_kind(before), _by_kind(after)
    lines = tuple(line for key in dict.fromkeys((*old, *new)) for line in _pool_lines(key, old.get(key), new.get(key)))
    flips = _role_flips(old, new)
    told = (f"  {flips} of these workers only change their role: no restart",) if flips else ()
    return Change(lines + told, flips)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Workers that are alike. `engine` is what can't change without a restart: GPU, parallelism and chunk."""

    said: str
    engine: tuple[str, str, int]


def _by_kind(plan: Plan) -> dict[_Kind, int]:
    """Workers of each kind."""
    counts: dict[_Kind, int] = {}
    for pool in plan.chosen.placement.pools:
        kind = _Kind(f"{pool.kind} on {pool.gpu}", (pool.gpu, str(pool.parallelism), pool.chunk_tokens))
        counts[kind] = counts.get(kind, 0) + pool.workers
    return counts


def _pool_lines(kind: _Kind, old: int | None, new: int | None) -> Iterable[str]:
    if old == new:
        yield f"  {old} {kind.said}"
        return
    if old:
        yield f"- {old} {kind.said}"
    if new:
        yield f"+ {new} {kind.said}"


def _role_flips(old: dict[_Kind, int], new: dict[_Kind, int]) -> int:
    """Workers with one engine that one role loses and another takes."""
    flips = 0
    for engine in {kind.engine for kind in (*old, *new)}:
        deltas = [new.get(kind, 0) - old.get(kind, 0) for kind in {*old, *new} if kind.engine == engine]
        flips += min(sum(delta for delta in deltas if delta > 0), -sum(delta for delta in deltas if delta < 0))
    return flips


def _quantiles(lengths: Histogram) -> str:
    """Linear within a bucket; the last bucket, which has no end, is taken to end at its beginning."""
    below = [0.0, *accumulate(lengths.counts)]
    finite = [bound for bound in lengths.bounds if isfinite(bound)]
    bounds = [0.0, *(min(bound, finite[-1]) for bound in lengths.bounds)]
    tokens = [max(1.0, float(np.interp(level * lengths.total, below, bounds))) for level in LEVELS]
    return ",".join(f"p{level * 100:g}={round(value)}" for level, value in zip(LEVELS, tokens, strict=True))


def _histogram(buckets: list[tuple[float, float]]) -> Histogram:
    """From Prometheus' buckets; those of several label sets are added."""
    bounds = sorted({bound for bound, _ in buckets})
    return counts_of(bounds, [sum(count for at, count in buckets if at == bound) for bound in bounds])


def _since(older: Histogram, newer: Histogram) -> Histogram:
    pairs = zip(older.counts, newer.counts, strict=True)
    return Histogram(newer.bounds, tuple(max(0.0, after - before) for before, after in pairs))
