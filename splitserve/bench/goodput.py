"""Goodput from measured points: the highest rate whose attainment is at least the target, with how sure that is.

At each rate, attainment is the share of all its requests, of whatever seed, that met the objectives. More load can't
help, so where a higher rate did better by luck the two are pooled: isotonic regression, weighted by requests. Goodput
is where that falling curve crosses the target, on a straight line between the last rate at or above it and the first
below, over the logarithm of the rate. Nothing is extrapolated: a target that every rate met, or none, bounds goodput
from one side and says so.

Pure. What an objective is, is `core/slo`; how resamples are drawn, `resampling`; which rates are measured, `sweep`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitserve.bench.resampling import CONFIDENCE, Resamples, Span, drawn, interval
from splitserve.core.slo import Slo, Timelines

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Point:
    """What one run measured. `seed` is the workload's: runs of one seed sent the same requests, in the same order.
    `first` is the number of the first of `timelines` among those that were sent: above 0 where a warm-up was left
    out."""

    rate_rps: float
    seed: int
    timelines: Timelines
    first: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A point under one SLO: which of its requests met it."""

    rate_rps: float
    seed: int
    met: Bools
    first: int = 0

    @property
    def span(self) -> Span:
        return Span(self.seed, self.first, len(self.met))


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests per second, with the bounds of its 95% interval. `at_least`: even the highest rate measured met the
    target, and `rps` is that rate. `at_most`: not even the lowest did; goodput is below `rps`, which is that rate. An
    open bound is where the rates measured end, not the interval."""

    rps: float
    low: float
    high: float
    at_least: bool = False
    at_most: bool = False
    low_open: bool = False
    high_open: bool = False


@dataclass(frozen=True, slots=True)
class Ratio:
    """One goodput over another, with the bounds of its 95% interval. It is only a bound where either goodput is:
    `at_least` and `at_most` as there, both if nothing can be said. An open bound is where the rates measured end."""

    value: float
    low: float
    high: float
    at_least: bool = False
    at_most: bool = False
    low_open: bool = False
    high_open: bool = False

    @property
    def unknown(self) -> bool:
        return self.at_least and self.at_most

    @property
    def leaves_open(self) -> bool:
        """It is a bound that either of the two may win by."""
        return (self.at_least and self.value < 1.0) or (self.at_most and self.value > 1.0)


@dataclass(frozen=True, slots=True)
class Share:
    """Of requests, or a difference of two such, with the bounds of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Attainment against rate, by rising rate. `fitted` is what the goodput is read from: `attainment`, made to
    fall."""

    rates_rps: Floats
    requests: npt.NDArray[np.int64]
    attainment: Floats
    fitted: Floats


def goodput(points: Sequence[Point], slo: Slo, resamples: int = RESAMPLES, seed: int = 0) -> Goodput:
    """Raises ValueError without points, for one without requests, and for objectives that its timelines can't tell."""
    return goodput_of(judged(points, slo), slo.attainment, resamples, seed)


def ratio(a: Sequence[Point], b: Sequence[Point], slo: Slo, resamples: int = RESAMPLES, seed: int = 0) -> Ratio:
    """Goodput of `a` over that of `b`. Seeds that both have are resampled together, so that requests which are hard
    for both do not widen the interval. Raises ValueError as `goodput`."""
    return ratio_of(judged(a, slo), judged(b, slo), slo.attainment, resamples, seed)


def judged(points: Iterable[Point], slo: Slo) -> tuple[Judged, ...]:
    """All that an SLO's objectives decide; its target attainment is not in it."""
    return tuple(Judged(point.rate_rps, point.seed, point.timelines.met(slo), point.first) for point in points)


def goodput_of(points: Sequence[Judged], target: float, resamples: int = RESAMPLES, seed: int = 0) -> Goodput:
    """`goodput`, of points that are judged already."""
    found = _crossings(points, _draws(points, resamples, seed), target)
    low, high = interval(found.rps)
    at_least, at_most = bool(found.above[0]), bool(found.below[0])
    return Goodput(float(found.rps[0]), low, high, at_least, at_most, _open(found.below), _open(found.above))


def ratio_of(
    a: Sequence[Judged], b: Sequence[Judged], target: float, resamples: int = RESAMPLES, seed: int = 0
) -> Ratio:
    """`ratio`, of points that are judged already."""
    draws = _draws([*a, *b], resamples, seed)
    over, under = _crossings(a, draws, target), _crossings(b, draws, target)
    values = over.rps / under.rps
    low, high = interval(values)
    more, less = over.above | under.below, over.below | under.above
    return Ratio(float(values[0]), low, high, bool(more[0]), bool(less[0]), _open(less), _open(more))


def curve(points: Sequence[Point], slo: Slo) -> Curve:
    """Raises ValueError as `goodput`."""
    return curve_of(judged(points, slo))


def curve_of(points: Sequence[Judged]) -> Curve:
    rates, met, requests = _tallies(points, _draws(points, 0, 0))
    return Curve(rates, requests[:, 0].astype(np.int64), met[:, 0] / requests[:, 0], _falling(met, requests)[:, 0])


def attainment_interval(timelines: Timelines, slo: Slo, resamples: int = RESAMPLES, seed: int = 0) -> Share:
    """Of one run. Drawing again can't show what never happened: where all or none of its requests met the objectives,
    the interval is that of a binomial share (Clopper and Pearson). Raises ValueError without requests, and for
    objectives that the timelines can't tell."""
    points = (Judged(1.0, 0, timelines.met(slo)),)
    found = _share(_attainments(points, _draws(points, resamples, seed)))
    unseen = 1.0 - ((1.0 - CONFIDENCE) / 2) ** (1.0 / len(timelines))
    if found.value == 1.0:
        return Share(1.0, 1.0 - unseen, 1.0)
    return Share(0.0, 0.0, unseen) if found.value == 0.0 else found


def attainment_difference(a: Sequence[Judged], b: Sequence[Judged], resamples: int = RESAMPLES, seed: int = 0) -> Share:
    """Attainment of `a` less that of `b`, each over all its points; seeds that both have are resampled together.
    Raises ValueError as `goodput`."""
    draws = _draws([*a, *b], resamples, seed)
    return _share(_attainments(a, draws) - _attainments(b, draws))


@dataclass(frozen=True, slots=True, eq=False)
class _Crossings:
    """Of each resample, the sample itself first. `above`: every rate met the target; `below`: none did."""

    rps: Floats
    above: Bools
    below: Bools


def _draws(points: Sequence[Judged], resamples: int, seed: int) -> Mapping[int, Resamples]:
    for point in points:
        if not len(point.met):
            raise ValueError(f"the run at {point.rate_rps:g} requests/s has no requests, so it measured nothing")
        if not point.rate_rps > 0.0:
            raise ValueError(f"a rate of {point.rate_rps:g} requests/s is not above 0")
    return drawn((point.span for point in points), resamples, seed)


def _crossings(points: Sequence[Judged], draws: Mapping[int, Resamples], target: float) -> _Crossings:
    rates, met, requests = _tallies(points, draws)
    fitted = _falling(met, requests)
    meeting = (fitted >= target).sum(axis=0)
    above, below = meeting == len(rates), meeting == 0
    last, next_ = np.clip(meeting - 1, 0, None), np.clip(meeting, None, len(rates) - 1)
    samples = np.arange(fitted.shape[1])
    high, low = fitted[last, samples], fitted[next_, samples]
    inside = ~(above | below)
    share = np.divide(high - target, high - low, out=np.zeros(len(samples)), where=inside)
    # A ratio's power, not a logarithm's exponential: a curve that crosses at a rate gives that rate exactly.
    rps = rates[last] * (rates[next_] / rates[last]) ** share
    return _Crossings(np.where(inside, rps, rates[last]), above, below)


def _tallies(points: Sequence[Judged], draws: Mapping[int, Resamples]) -> tuple[Floats, Floats, Floats]:
    """The rates, rising, and at each, of each resample, how many requests met their objectives and how many there
    are."""
    if not points:
        raise ValueError("goodput needs at least one measured point")
    rates = np.unique([point.rate_rps for point in points])
    samples = len(draws[points[0].seed].counts)
    met, requests = np.zeros((len(rates), samples)), np.zeros((len(rates), samples))
    for point in points:
        row = np.searchsorted(rates, point.rate_rps)
        for tally, weight in zip((met, requests), _tally(point, draws[point.seed]), strict=True):
            tally[row] += weight
    return rates, met, requests


def _tally(point: Judged, draws: Resamples) -> tuple[Floats, Floats]:
    """A resample that has none of a short run's requests takes them all."""
    counts = draws.of(point.span)
    # einsum, as `@` would wake all of BLAS's threads.
    met = np.einsum("bn,n->b", counts, point.met.astype(np.float64))
    requests = counts.sum(axis=1)
    missed = requests == 0.0
    return np.where(missed, met[0], met), np.where(missed, requests[0], requests)


def _falling(met: Floats, requests: Floats) -> Floats:
    """Isotonic regression of met / requests along the rates, for all resamples at once: the least, over where a pool
    may begin, of the greatest, over where it may end, of the pool's share (Robertson, Wright and Dykstra, 1.4). Shares
    are quotients of whole numbers, so that 180 of 200 is 0.9 and no rounding decides."""
    rates = len(met)
    begun = np.concatenate((np.zeros((1, met.shape[1])), np.cumsum(met, axis=0)))
    sizes = np.concatenate((np.zeros((1, met.shape[1])), np.cumsum(requests, axis=0)))
    fitted = np.full(met.shape, np.inf)
    for start in range(rates):
        pools = (begun[start + 1 :] - begun[start]) / (sizes[start + 1 :] - sizes[start])
        greatest = np.maximum.accumulate(pools[::-1], axis=0)[::-1]
        np.minimum(fitted[start:], greatest, out=fitted[start:])
    return fitted


def _attainments(points: Sequence[Judged], draws: Mapping[int, Resamples]) -> Floats:
    _, met, requests = _tallies(points, draws)
    return np.asarray(met.sum(axis=0) / requests.sum(axis=0))


def _share(values: Floats) -> Share:
    return Share(float(values[0]), *interval(values))


def _open(beyond: Bools) -> bool:
    """Whether so many resamples lie beyond the rates measured that the interval's end does."""
    return bool(beyond[1:].mean() > (1.0 - CONFIDENCE) / 2) if len(beyond) > 1 else bool(beyond[0])
