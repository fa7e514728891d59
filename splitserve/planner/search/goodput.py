"""Finds the highest rate that meets an objective, and how sure that is: bisection, Student's t, interpolation over
seeds. Pure; what is simulated at a rate is the caller's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt

from splitserve.core.slo import Slo, attainment
from splitserve.planner.deployment import Deployment
from splitserve.planner.result import Interval, RatePoint
from splitserve.planner.simulator.outcome import Outcome
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.workload import Workload

# 97.5% quantiles of Student's t by degrees of freedom, from 1 on; the last is the normal distribution's.
# fmt: off
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042, 1.960)
# fmt: on
_LEAST_SHARE = 1 / 64  # of the ceiling: a rate below that is none


@dataclass(frozen=True, slots=True)
class Bracket:
    """`low` meets the objective (0: no rate does), `high` doesn't; both are the ceiling if that is met."""

    low: float
    high: float


def highest(meets: Callable[[float], bool], guess: float, ceiling: float, step: float) -> Bracket:
    """The highest rate that meets it, to within `step` of itself. Assumes that what meets it at a rate does at any
    lower one. Starts at the guess; never asks above the ceiling."""
    low, high, rate, stride = 0.0, 0.0, min(guess, ceiling), 1 + 2 * step
    while not (low and high):
        if meets(rate):
            low = rate
            if rate >= ceiling:
                return Bracket(low, low)
            rate = min(ceiling, rate * stride)
        else:
            high = rate
            if rate <= ceiling * _LEAST_SHARE:
                return Bracket(0.0, high)
            rate = max(rate / stride, ceiling * _LEAST_SHARE)
        stride *= stride
    while high > low * (1 + step):
        middle = sqrt(low * high)
        low, high = (middle, high) if meets(middle) else (low, middle)
    return Bracket(low, high)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% confidence interval by Student's t; of no width for a single value."""
    mean, degrees = sum(values) / len(values), len(values) - 1
    if not degrees:
        return Interval(mean, mean, mean)
    variance = sum((value - mean) ** 2 for value in values) / degrees
    half = _T[min(degrees, len(_T)) - 1] * sqrt(variance / len(values))
    return Interval(mean, mean - half, mean + half)


@dataclass(slots=True)
class Trials:
    """Simulations of one deployment, each made once. The same seed brings the same requests at every rate and to every
    deployment. `adaptive`: the router schedules by the objectives, not by roles. Keeps attainments, and the first
    seed's outcomes."""

    deployment: Deployment
    workload: Workload
    slo: Slo
    requests: int
    seed: int
    ceiling_rps: float
    adaptive: bool = False
    attained: dict[tuple[float, int], float] = field(default_factory=dict)
    outcomes: dict[float, Outcome] = field(default_factory=dict)
    simulated: int = 0

    def attainment(self, rate_rps: float, number: int = 0) -> float:
        """With the so-many-th seed."""
        if (rate_rps, number) not in self.attained:
            drawn = self.workload.draw(self.requests, rate_rps, self.seed + number)
            scheduled_by = self.slo if self.adaptive else None
            outcome = simulate(self.deployment, drawn, self.seed + number, slo=scheduled_by)
            self.simulated += len(drawn)
            self.attained[rate_rps, number] = attainment(outcome.timelines, self.slo)
            if not number:
                self.outcomes[rate_rps] = outcome
        return self.attained[rate_rps, number]

    def bracket(self, guess_rps: float, step: float, number: int = 0) -> Bracket:
        """Around one seed's goodput."""

        def meets(rate_rps: float) -> bool:
            return self.attainment(rate_rps, number) >= self.slo.attainment

        return highest(meets, guess_rps, self.ceiling_rps, step)

    def goodput(self, bracket: Bracket, seeds: int, step: float) -> Interval:
        """Over seeds, from the first one's bracket."""
        if not bracket.low:
            return interval([0.0])
        return interval([self._goodput(bracket, step, number) for number in range(seeds)])

    def points(self) -> tuple[RatePoint, ...]:
        """Every rate simulated, by rate."""
        rates = sorted({rate for rate, _ in self.attained})
        by_rate = {rate: [a for (r, _), a in sorted(self.attained.items()) if r == rate] for rate in rates}
        return tuple(RatePoint(rate, _share(interval(found))) for rate, found in by_rate.items())

    def _goodput(self, bracket: Bracket, step: float, number: int) -> float:
        """One seed's: where the straight line through its attainments at the ends of a bracket meets the target. The
        given bracket will do if that is near it, else this seed gets its own."""
        rate = self._crossing(bracket, number)
        if bracket.low / (1 + step) <= rate <= bracket.high * (1 + step):
            return min(rate, self.ceiling_rps)
        own = self.bracket(min(max(rate, bracket.low / 2), bracket.high * 2), step, number)
        return self._crossing(own, number) if own.low else 0.0

    def _crossing(self, bracket: Bracket, number: int) -> float:
        """The attainment at one rate suffices where it is the ceiling and met."""
        low, high, target = bracket.low, bracket.high, self.slo.attainment
        at_low = self.attainment(low, number)
        if low == high:
            return low if at_low >= target else 0.0
        fall = at_low - self.attainment(high, number)
        if fall <= 0.0:
            return low if at_low < target else high
        return low + (at_low - target) / fall * (high - low)


def _share(found: Interval) -> Interval:
    return Interval(found.mean, max(0.0, found.low), min(1.0, found.high))
