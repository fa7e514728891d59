"""When requests come. Common random numbers: a seed fixes the arrivals at one request per second; a rate scales them.

So at twice the rate the same requests come in the same order, in half the time, and what differs between two
simulations is the rate alone.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from splitserve.core.errors import ConfigError

Seconds = npt.NDArray[np.float64]


class Arrivals(Protocol):
    """A process that `count` requests come by."""

    def times(self, count: int, rate_rps: float, rng: np.random.Generator) -> Seconds:
        """Seconds from the start, in order; `rate_rps` is the mean rate."""


@dataclass(frozen=True, slots=True)
class Constant:
    """One every 1/rate seconds, the first at once."""

    def times(self, count: int, rate_rps: float, rng: np.random.Generator) -> Seconds:
        return np.arange(count) / rate_rps

    def __str__(self) -> str:
        return "constant"


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent of each other."""

    def times(self, count: int, rate_rps: float, rng: np.random.Generator) -> Seconds:
        return np.cumsum(rng.standard_exponential(count)) / rate_rps

    def __str__(self) -> str:
        return "poisson"


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps are gamma-distributed with deviation `cv` times their mean: above 1 in bursts, below 1 more even than
    Poisson."""

    cv: float

    def __post_init__(self) -> None:
        if not 0.05 <= self.cv <= 20.0:
            raise ConfigError("cv", f"{self.cv:g} is not between 0.05 and 20 (1 is Poisson, more is burstier)")

    def times(self, count: int, rate_rps: float, rng: np.random.Generator) -> Seconds:
        shape = 1.0 / self.cv**2
        return np.cumsum(rng.standard_gamma(shape, count)) / shape / rate_rps

    def __str__(self) -> str:
        return f"gamma:cv={self.cv:g}"


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Poisson whose rate goes up and down as a sine: `peak` times the mean at most, once per `period_s` seconds. It
    starts at the mean, going up. Times are a Poisson process's, mapped through the inverse of the expected count
    (Çinlar's method), so the same seed gives the same requests at any rate; the period is in real seconds and does not
    scale."""

    peak: float = 1.5
    period_s: float = 86400.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.peak <= 2.0:
            raise ConfigError("peak", f"{self.peak:g} is not between 1 and 2 (times the mean; at 2 the trough is 0)")
        if not 0.0 < self.period_s < math.inf:
            raise ConfigError("period", f"{self.period_s:g} is not a number of seconds above 0")

    def times(self, count: int, rate_rps: float, rng: np.random.Generator) -> Seconds:
        expected = np.cumsum(rng.standard_exponential(count)) / rate_rps / self.period_s
        cycles = np.floor(expected)
        share = np.linspace(0.0, 1.0, _GRID)
        swing = (self.peak - 1.0) / (2.0 * np.pi)
        done = share + swing * (1.0 - np.cos(2.0 * np.pi * share))  # expected arrivals of one period by then
        return np.asarray((cycles + np.interp(expected - cycles, done, share)) * self.period_s)

    def __str__(self) -> str:
        return f"diurnal:peak={self.peak:g},period={self.period_s:g}"


_GRID = 8193
_SHORTEST_S = 1e-9  # a trace of less has no duration: clocks tell no shorter one, and its rate would be beyond a float


def rescaled(arrival_s: Seconds, rate_rps: float) -> Seconds:
    """A trace's arrivals from 0 on, stretched or squeezed to the rate. Its own rate is one request fewer than it has
    over the time between first and last; a trace without duration comes at once, at any rate."""
    if len(arrival_s) < 2:
        return np.zeros(len(arrival_s))
    since = arrival_s - arrival_s[0]
    span_s = since[-1]
    if span_s < _SHORTEST_S:
        return np.zeros(len(since))
    return np.asarray(since * ((len(arrival_s) - 1) / span_s / rate_rps))
