"""Which run is worth making next: given the runs there are, the rate and the seed that say most about goodput.

From a start rate, twice and twice again as fast (or half as fast) until one rate meets the target and one misses it;
then the geometric middle between the two, until they are within a step of each other; then more seeds at these two. All
points of a rate count, and where a higher rate did better by luck, the curve that `goodput` fits decides: so what is
looked for here is what is reported there, and a further seed may move it.

Pure: a search that was cut short goes on from its points, as there is no other state.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from splitserve.bench.goodput import Judged, curve_of
from splitserve.core.errors import ConfigError

_DIGITS = 4  # of a rate: it is in names of files and in tables
_FINEST = 0.01  # a step that these digits tell apart


@dataclass(frozen=True, slots=True)
class Options:
    """How to look. `step`: how far apart the two rates around goodput may be, as a share. `seeds`: all rates are run
    with the first, the two around goodput with the others too. With `rates_rps` nothing is looked for: each of these is
    run with each seed. Requests due in the first `warm_up_s` seconds are sent, and not judged. Raises ConfigError for
    what can't be."""

    start_rps: float = 1.0
    step: float = 0.1
    seeds: tuple[int, ...] = (0, 1)
    lowest_rps: float = 0.01
    highest_rps: float = 10_000.0
    rates_rps: tuple[float, ...] = ()
    warm_up_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.lowest_rps <= self.start_rps <= self.highest_rps < math.inf:
            said = f"{self.lowest_rps:g} <= {self.start_rps:g} <= {self.highest_rps:g}"
            raise ConfigError("start_rps", f"is to be between the lowest rate, above 0, and the highest, not {said}")
        if not _FINEST <= self.step <= 1.0:
            raise ConfigError("step", f"{self.step:g} is not between {_FINEST:g} and 1 (0.1 is ten percent)")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError("seeds", "are to be at least one, from 0 on, and each another")
        if not all(0.0 < rate < math.inf for rate in self.rates_rps):
            raise ConfigError("rates_rps", "are to be above 0")
        if not 0.0 <= self.warm_up_s < math.inf:
            raise ConfigError("warm_up_s", f"{self.warm_up_s:g} is not a number of seconds from 0 on")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run to make. `left`: how many more there will be, this one included, as far as can be told."""

    rate_rps: float
    seed: int
    left: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing is to be run. `why` is a sentence where goodput was not enclosed, else empty."""

    why: str = ""


@dataclass(frozen=True, slots=True)
class Bracket:
    """The highest rate known to meet the target and the lowest known to miss it, by the fitted curve; None where no
    rate does."""

    met_rps: float | None
    missed_rps: float | None


def next_run(points: Sequence[Judged], target: float, options: Options) -> Wanted | Finished:
    """`points`: all that was measured, under one SLO."""
    done = {(point.rate_rps, point.seed) for point in points}
    if options.rates_rps:
        return _first_missing(options.rates_rps, options.seeds, done)
    found = bracket(points, target)
    rate = _next_rate(found, options)
    if isinstance(rate, Finished):
        return rate
    if rate is not None:
        return Wanted(rate, options.seeds[0], _left(found, options))
    return _first_missing(_ends(found), options.seeds, done)


def bracket(points: Sequence[Judged], target: float) -> Bracket:
    if not points:
        return Bracket(None, None)
    curve = curve_of(points)
    meeting = int((curve.fitted >= target).sum())
    rates = [None, *curve.rates_rps.tolist(), None]
    return Bracket(rates[meeting], rates[meeting + 1])


def _next_rate(found: Bracket, options: Options) -> float | Finished | None:
    """None where goodput is enclosed closely enough."""
    met, missed = found.met_rps, found.missed_rps
    if met is None and missed is None:
        return options.start_rps
    if missed is None:
        assert met is not None
        return _above(met, options)
    if met is None:
        return _below(missed, options)
    return _rounded(math.sqrt(met * missed)) if missed > met * (1.0 + options.step) * _ROUNDING else None


_ROUNDING = 1.0 + 10.0 ** (1 - _DIGITS)


def _above(met_rps: float, options: Options) -> float | Finished:
    if met_rps >= options.highest_rps:
        return Finished(f"even {met_rps:g} requests/s, the highest rate allowed, met the objectives: allow higher ones")
    return min(options.highest_rps, max(options.lowest_rps, _rounded(met_rps * 2.0)))


def _below(missed_rps: float, options: Options) -> float | Finished:
    if missed_rps <= options.lowest_rps:
        return Finished(
            f"even {missed_rps:g} requests/s, the lowest rate allowed, missed the objectives: loosen them, or see "
            "whether the target works at all"
        )
    return max(options.lowest_rps, min(options.highest_rps, _rounded(missed_rps / 2.0)))


def _rounded(rate_rps: float) -> float:
    return float(f"{rate_rps:.{_DIGITS}g}")


def _ends(found: Bracket) -> tuple[float, float]:
    assert found.met_rps is not None
    assert found.missed_rps is not None
    return found.met_rps, found.missed_rps


def _first_missing(rates: Sequence[float], seeds: Sequence[int], done: set[tuple[float, int]]) -> Wanted | Finished:
    """Seed by seed, so that what is cut short has seen all rates."""
    pairs = dict.fromkeys((rate, seed) for seed, rate in itertools.product(seeds, rates))
    missing = [pair for pair in pairs if pair not in done]
    return Wanted(*missing[0], len(missing)) if missing else Finished()


def _left(found: Bracket, options: Options) -> int:
    """Halvings of the bracket, which without an end is taken to have it at the next rate, and the seeds."""
    met, missed = found.met_rps, found.missed_rps
    known = met is not None and missed is not None
    width = math.log(missed / met) if met and missed else math.log(2.0)
    halvings = max(0, math.ceil(math.log2(width / math.log1p(options.step))))
    return halvings + (0 if known else 1) + (1 if met is None and missed is None else 0) + 2 * (len(options.seeds) - 1)
