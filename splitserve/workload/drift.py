"""How far live traffic is from the workload that a plan was made for. Pure: numbers in, numbers out.

Live lengths are counts per bucket, as Prometheus has them; the planned ones are quantiles, as the plan file has them.
Between quantiles a length's logarithm is linear in the share, so distances are only as fine as both allow: bucket
bounds are where they are compared.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitserve.workload.workload import Quantiles, Summary

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]` requests have at most `bounds[i]` tokens and more than the bound before; the last bound may be inf.
    `counts_of` makes these from Prometheus' cumulative ones."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.bounds) == len(self.counts)

    @property
    def total(self) -> float:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What came in over some time."""

    rate_rps: float
    prompt: Histogram
    output: Histogram


@dataclass(frozen=True, slots=True)
class Shift:
    """Of prompt or output lengths. `ks` is the largest distance between the cumulative shares (Kolmogorov-Smirnov), at
    `at_tokens`, `noise` what it is by chance in one of a hundred samples of that size; `psi` is the population
    stability index, of which 0.1 counts as a small shift and 0.25 as a large one."""

    ks: float
    at_tokens: float
    noise: float
    psi: float


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far live traffic may be from the plan's before it is said to have drifted. `ks`: by default a tenth of all
    requests may be elsewhere, as many as an attainment of 90% may miss. Fewer than `requests` say nothing of
    lengths."""

    rate: float = 0.15  # share by which the rate may differ, either way
    ks: float = 0.1
    psi: float = 0.25
    requests: int = 200


@dataclass(frozen=True, slots=True)
class Drift:
    """`rate_ratio`: live over planned. A shift is None where there were too few requests to tell."""

    rate_ratio: float
    prompt: Shift | None
    output: Shift | None
    reasons: tuple[str, ...]  # sentences; empty if within tolerance

    @property
    def drifted(self) -> bool:
        return bool(self.reasons)


def drift(plan: Summary, planned_rate_rps: float, live: Traffic, tolerance: Tolerance | None = None) -> Drift:
    """Compares rate, prompt lengths and output lengths. The planned rate is above 0."""
    assert planned_rate_rps > 0.0
    tolerance = tolerance or Tolerance()
    ratio = live.rate_rps / planned_rate_rps
    prompt = shift(plan.prompt, live.prompt) if live.prompt.total >= tolerance.requests else None
    output = shift(plan.output, live.output) if live.output.total >= tolerance.requests else None
    reasons = []
    if abs(ratio - 1.0) > tolerance.rate:
        reasons.append(f"{live.rate_rps:.3g} requests/s, {ratio:.2f} times the planned {planned_rate_rps:.3g}")
    reasons += _reasons("prompts", plan.prompt, live.prompt, prompt, tolerance)
    reasons += _reasons("outputs", plan.output, live.output, output, tolerance)
    return Drift(ratio, prompt, output, tuple(reasons))


def shift(planned: Quantiles, live: Histogram) -> Shift:
    """Live lengths against planned quantiles, compared at the buckets' bounds; at least one request."""
    assert live.total > 0
    bounds = np.array(live.bounds, dtype=np.float64)
    seen = np.cumsum(live.counts) / live.total
    expected = np.where(np.isinf(bounds), 1.0, cumulative(planned, bounds))
    return _shift(expected, seen, bounds, live.total)


def shift_between(planned: Quantiles, live: Quantiles, requests: int) -> Shift:
    """Both as quantiles, compared at the points of both. `requests`: how many the live ones are of."""
    points = np.unique(np.concatenate((_knots(planned)[0], _knots(live)[0])))
    return _shift(cumulative(planned, points), cumulative(live, points), points, requests)


def cumulative(planned: Quantiles, tokens: Floats) -> Floats:
    """The share of requests with at most that many tokens."""
    lengths, shares = _knots(planned)
    found = np.interp(np.log(np.maximum(tokens, 0.5)), np.log(lengths), shares)
    return np.where(tokens >= lengths[-1], 1.0, found)


def counts_of(bounds: Sequence[float], cumulative_counts: Sequence[float]) -> Histogram:
    """From Prometheus' buckets (`le` and the count up to it), in order of their bounds."""
    counts = [cumulative_counts[0], *(b - a for a, b in itertools.pairwise(cumulative_counts))]
    return Histogram(tuple(bounds), tuple(max(0.0, count) for count in counts))


def _shift(expected: Floats, seen: Floats, points: Floats, requests: float) -> Shift:
    distance = np.abs(expected - seen)
    widest = int(distance.argmax())
    noise = 1.628 / math.sqrt(requests)  # Kolmogorov's 99% point for large samples
    return Shift(float(distance[widest]), float(points[widest]), noise, _psi(expected, seen))


def _psi(expected: Floats, seen: Floats) -> float:
    """Sum of (seen - expected) ln(seen / expected) over bins of at least a tenth of what is expected; no bin is taken
    to be rarer than one in a thousand, as its logarithm would be noise."""
    edges = [0.0]
    chosen = [0.0]
    for share, held in zip(expected, seen, strict=True):
        if share - edges[-1] >= _BIN and 1.0 - share >= _BIN:
            edges.append(float(share))
            chosen.append(float(held))
    planned = np.maximum(np.diff([*edges, 1.0]), _RAREST)
    live = np.maximum(np.diff([*chosen, 1.0]), _RAREST)
    return float(((live - planned) * np.log(live / planned)).sum())


_BIN, _RAREST = 0.1, 0.001


def _knots(quantiles: Quantiles) -> tuple[Floats, Floats]:
    """Lengths that rise, and the share at most as long. Equal quantiles are one step, whose top counts."""
    q = quantiles
    steps = [(q.p10, 0.1), (q.p25, 0.25), (q.p50, 0.5), (q.p75, 0.75), (q.p90, 0.9), (q.p99, 0.99), (q.longest, 1.0)]
    tops = dict(steps)
    lengths, shares = list(tops), list(tops.values())
    # Below the first there is no quantile: as far down, in logarithms, as the next is up.
    below = lengths[0] * lengths[0] / lengths[1] if len(lengths) > 1 else lengths[0] - 0.5
    return np.array([max(0.5, below), *lengths]), np.array([0.0, *shares])


def _reasons(what: str, planned: Quantiles, live: Histogram, found: Shift | None, tolerance: Tolerance) -> list[str]:
    if found is None or (found.ks <= max(tolerance.ks, found.noise) and found.psi <= tolerance.psi):
        return []
    # What the distance is at, rather than medians: buckets have no median.
    at = np.array([found.at_tokens])
    expected = 1.0 if math.isinf(found.at_tokens) else float(cumulative(planned, at)[0])
    seen = sum(count for bound, count in zip(live.bounds, live.counts, strict=True) if bound <= found.at_tokens)
    share = seen / live.total
    return [f"{share:.0%} of {what} have at most {found.at_tokens:g} tokens, planned were {expected:.0%}"]
