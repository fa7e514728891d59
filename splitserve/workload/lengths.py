"""How many tokens prompts and outputs have: distributions over whole numbers, cut off at limits. Drawing takes a
generator, so that the same seed gives the same lengths.

Every distribution is held as its cumulative share per number of tokens: means, quantiles and cut-offs are exact, and a
million draws are one search in a sorted array.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitserve.core.errors import ConfigError

Floats = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]

CORRECTIONS, CLOSE = 500, 1e-7  # of a calibration: steps at most, and the mean's relative error
LONGEST_TOKENS = 1 << 20  # no limit given: nothing that serves today reads more


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """`cumulative[n]` is the share of requests with at most n tokens; the last is 1."""

    cumulative: Floats

    @property
    def shares(self) -> Floats:
        """Of each number of tokens, from 0."""
        return np.diff(self.cumulative, prepend=0.0)

    @property
    def mean(self) -> float:
        return float((np.arange(len(self.cumulative)) * self.shares).sum())  # `@` would wake all of BLAS's threads

    @property
    def deviation(self) -> float:
        """Standard deviation in tokens."""
        off = np.arange(len(self.cumulative)) - self.mean
        return math.sqrt(float((off**2 * self.shares).sum()))

    def at(self, levels: npt.ArrayLike) -> Tokens:
        """The fewest tokens that a share `level` of the requests does not exceed."""
        found = np.searchsorted(self.cumulative, np.asarray(levels, dtype=np.float64))
        return np.minimum(found, len(self.cumulative) - 1).astype(np.int64)

    def draw(self, count: int, rng: np.random.Generator) -> Tokens:
        # random() can be 0, and no request has the length whose share is 0.
        return self.at(1.0 - rng.random(count))


def fixed(tokens: int) -> Lengths:
    """Always the same. Raises ConfigError below 1."""
    return uniform(tokens, tokens)


def uniform(low: int, high: int) -> Lengths:
    """Each whole number from `low` to `high` as often. Raises ConfigError if there is none."""
    _check_limits(low, high)
    shares = np.zeros(high + 1)
    shares[low:] = 1.0
    return of_shares(shares)


def lognormal(mean: float, sigma: float, low: int = 1, high: int | None = None) -> Lengths:
    """Logarithms are normal with deviation `sigma`; none is below `low` or above `high`, and `mean` is what the mean is
    after that. Raises ConfigError if no such distribution has that mean."""
    high = high or _reach(mean, sigma)
    _check_limits(low, high)
    _check_lognormal(mean, sigma, low, high)
    return calibrated(lambda mu: lognormal_of(mu, sigma, low, high), mean)


def lognormal_of(mu: float, sigma: float, low: int, high: int) -> Lengths:
    """`mu` is the mean of the logarithms before the limits cut."""
    return _of_cumulative(lambda edges: _normal((np.log(edges) - mu) / sigma), low, high)


def calibrated(distribution: Callable[[float], Lengths], mean: float) -> Lengths:
    """The member with that mean of a family that `mu`, the mean logarithm, shifts. Raises ConfigError if there is none.

    The logarithm of the mean rises with mu, by at most as much: the secant, its slope held to that, converges.
    """
    mu, slope, before = math.log(mean), 1.0, None
    for _ in range(CORRECTIONS):
        lengths = distribution(mu)
        error = math.log(mean / lengths.mean)
        if abs(error) < CLOSE:
            return lengths
        if before is not None:
            slope = min(1.0, max(0.02, (before[1] - error) / (mu - before[0])))
        before, mu = (mu, error), mu + error / slope
    raise ConfigError("mean", f"no such distribution has a mean of {mean:g} tokens: the limits are too close to it")


def spread_lognormal(mean: float, deviation: float, low: int, high: int) -> Lengths:
    """Lognormal within limits with both this mean and, or as near as one can be, this standard deviation in tokens."""
    narrow, wide = math.log(0.05), math.log(4.0)
    for _ in range(_HALVINGS):
        middle = (narrow + wide) / 2
        if lognormal(mean, math.exp(middle), low, high).deviation < deviation:
            narrow = middle
        else:
            wide = middle
    return lognormal(mean, math.exp(narrow), low, high)


def from_quantiles(quantiles: Mapping[float, float], low: int = 1, high: int | None = None) -> Lengths:
    """Through the given points, level (0.9) to tokens; between them, and beyond the outer ones, the logarithm of the
    length is linear in the normal score of the level (two points make a lognormal). Levels 0 and 1 are the limits.
    Raises ConfigError for fewer than two points, levels outside 0..1 or lengths that fall as levels rise."""
    points = dict(sorted(quantiles.items()))
    low, high = int(points.pop(0.0, low)), int(points.pop(1.0, high or 0)) or high
    _check_points(points)
    levels, tokens = np.array(list(points)), np.log(np.array(list(points.values())))
    scores = np.interp(levels, _SHARE, _SCORE).astype(np.float64)
    rising = tokens + np.arange(len(tokens)) * 1e-9  # equal lengths: a step, not a division by zero
    high = high or min(LONGEST_TOKENS, math.ceil(math.exp(_extended(np.array([3.1]), scores, rising)[0])))
    _check_limits(low, high)
    below = _normal(_extended(np.log(_edges(low, high)), rising, scores))
    below[0], below[-1] = 0.0, 1.0  # what is beyond the limits has the limits' length, or the quantiles would move
    return of_shares(np.concatenate((np.zeros(low), np.diff(below))))


def empirical(tokens: Tokens) -> Lengths:
    """As often as they occur."""
    return of_shares(np.bincount(tokens).astype(np.float64))


def of_shares(shares: Floats) -> Lengths:
    """`shares[n]` of the requests, in any unit, have n tokens. Raises ConfigError if all are 0."""
    cumulative = np.cumsum(shares)
    if not cumulative[-1] > 0.0:
        raise ConfigError("lengths", "none is left within the limits: widen them")
    return Lengths(cumulative / cumulative[-1])


def truncated(lengths: Lengths, low: int, high: int) -> Lengths:
    """Those from `low` to `high`, as often as before relative to each other. Raises ConfigError if none is left."""
    _check_limits(low, high)
    shares = lengths.shares[: high + 1].copy()
    shares[:low] = 0.0
    return of_shares(shares)


_HALVINGS = 16  # of a search for sigma

# Standard normal: scores and the share below each, fine enough that linear interpolation errs by less than 1e-6.
_SCORE = np.linspace(-8.0, 8.0, 16385)
_SHARE = np.array([0.5 * math.erfc(-score / math.sqrt(2.0)) for score in _SCORE.tolist()])


def _normal(scores: Floats) -> Floats:
    """Share of a standard normal below each score."""
    return np.asarray(np.interp(scores, _SCORE, _SHARE), dtype=np.float64)


def _of_cumulative(below: Callable[[Floats], Floats], low: int, high: int) -> Lengths:
    """Whole numbers from a continuous distribution, whose parts outside the limits are cut off: n stands for n - 1/2 to
    n + 1/2."""
    shares = np.zeros(high + 1)
    shares[low:] = np.diff(below(_edges(low, high)))
    return of_shares(shares)


def _edges(low: int, high: int) -> Floats:
    return np.arange(low, high + 2, dtype=np.float64) - 0.5


def _extended(x: Floats, xs: Floats, ys: Floats) -> Floats:
    """Linear interpolation that goes on beyond both ends as in the outer segments."""
    segment = np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2)
    slope = (ys[segment + 1] - ys[segment]) / (xs[segment + 1] - xs[segment])
    return np.asarray(ys[segment] + slope * (x - xs[segment]))


def _reach(mean: float, sigma: float) -> int:
    """Beyond all but about one in ten thousand of a lognormal's lengths."""
    return min(LONGEST_TOKENS, max(2, math.ceil(mean * math.exp(3.7 * sigma - sigma**2 / 2)))) if mean > 0 else 2


def _check_limits(low: int, high: int) -> None:
    if low < 1:
        raise ConfigError("lengths", f"{low} tokens: a prompt and an output have at least 1")
    if high < low:
        raise ConfigError("lengths", f"the longest ({high} tokens) is shorter than the shortest ({low})")
    if high > LONGEST_TOKENS:
        raise ConfigError("lengths", f"{high} tokens is more than {LONGEST_TOKENS}, the longest that is modelled")


def _check_lognormal(mean: float, sigma: float, low: int, high: int) -> None:
    if not 0.01 <= sigma <= 4.0:
        raise ConfigError("sigma", f"{sigma:g} is not between 0.01 and 4 (deviation of the lengths' logarithm)")
    if not low < mean < high:
        raise ConfigError("mean", f"{mean:g} tokens is not between the limits, {low} and {high}")


def _check_points(points: Mapping[float, float]) -> None:
    if len(points) < 2:
        raise ConfigError("quantiles", "give at least two, such as p50=200,p90=900")
    for level, tokens in points.items():
        if not 0.0005 <= level <= 0.9999:
            raise ConfigError("quantiles", f"p{100 * level:g} is not between p0.05 and p99.99 (p0 and p100 are limits)")
        if not 1 <= tokens <= LONGEST_TOKENS:
            raise ConfigError("quantiles", f"p{100 * level:g}={tokens:g}: give 1 to {LONGEST_TOKENS} tokens")
    pairs = list(points.items())
    for (before, shorter), (level, tokens) in itertools.pairwise(pairs):
        if tokens < shorter:
            raise ConfigError("quantiles", f"p{100 * level:g}={tokens:g} is below p{100 * before:g}={shorter:g}")
