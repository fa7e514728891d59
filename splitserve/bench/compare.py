"""Measures systems beside each other, in turns, and says by how much one is better.

A machine's speed drifts: whoever is measured second is measured on another machine. So the systems take turns run by
run, and who begins a round changes with each: A B, B A, A B. All send the same requests of the same seeds, which is
what makes a ratio sharp; see `resampling`.

One coroutine's: runs are awaited one at a time. `compared` is pure, and does the arithmetic for runs of whatever day.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitserve.bench.goodput import RESAMPLES, Judged, Ratio, Share, attainment_difference, ratio_of
from splitserve.bench.percentiles import Part, Quotient, quotients
from splitserve.bench.search import Options
from splitserve.bench.sweep import Measure, Measured, Report, Search, Sweep, judged_by
from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo


@dataclass(frozen=True, slots=True)
class AtRate:
    """One rate that both systems were measured at, with the seeds that both had. `differences`: attainment of a less
    that of b, under each SLO."""

    rate_rps: float
    seeds: tuple[int, ...]
    differences: tuple[Share, ...]
    quotients: tuple[Quotient, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """System a beside system b. `ratios`: goodput of a over that of b, under each SLO; None where either has no valid
    run."""

    a: str
    b: str
    ratios: tuple[Ratio | None, ...]
    rates: tuple[AtRate, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """`sweeps`: of each system, under each SLO. `pairs`: each system beside each that was named after it."""

    slos: tuple[Slo, ...]
    sweeps: Mapping[str, tuple[Sweep, ...]]
    pairs: tuple[Pair, ...]


async def compare(
    systems: Mapping[str, Measure],
    slos: Sequence[Slo],
    options: Options | None = None,
    report: Report | None = None,
    known: Mapping[str, Sequence[Measured]] | None = None,
) -> Comparison:
    """Each system runs until its goodput is enclosed under every SLO, or all `options.rates_rps` are measured; see
    `sweep`. Raises ConfigError for fewer than two systems, without an SLO, and as `sweep` does."""
    if len(systems) < 2:
        raise ConfigError("systems", f"a comparison needs two, and got {len(systems)}")
    if not slos:
        raise ConfigError("slos", "a comparison needs at least one")
    options, known = options or Options(), known or {}
    searches = {name: Search(measure, slos, options, known.get(name, ())) for name, measure in systems.items()}
    for turn in itertools.count():
        if not await _round(searches, turn, report):
            break
    sweeps = {name: tuple(search.result(slo) for slo in slos) for name, search in searches.items()}
    return Comparison(tuple(slos), sweeps, compared({name: search.measured for name, search in searches.items()}, slos))


def compared(
    measured: Mapping[str, Sequence[Measured]], slos: Sequence[Slo], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Pair, ...]:
    """Each system beside each that was named after it, by their valid runs. Raises ConfigError as `sweep`."""
    valid = {name: [one for one in runs if one.valid] for name, runs in measured.items()}
    return tuple(
        Pair(
            a,
            b,
            tuple(_ratio(valid[a], valid[b], slo, resamples, seed) for slo in slos),
            tuple(_rates(valid[a], valid[b], slos, resamples, seed)),
        )
        for a, b in itertools.combinations(valid, 2)
    )


async def _round(searches: Mapping[str, Search], turn: int, report: Report | None) -> bool:
    """A run of each system that still wants one; False if none does."""
    names = list(searches)[:: 1 if turn % 2 == 0 else -1]
    any_ = False
    for name in names:
        wanted = searches[name].wanted()
        if wanted is None:
            continue
        any_ = True
        await searches[name].take(wanted)
        if report is not None:
            shares = [search.share for search in searches.values()]
            report(f"{name}: {searches[name].said()}", sum(shares) / len(shares))
    return any_


def _ratio(a: Sequence[Measured], b: Sequence[Measured], slo: Slo, resamples: int, seed: int) -> Ratio | None:
    if not a or not b:
        return None
    return ratio_of(_judged(a, slo), _judged(b, slo), slo.attainment, resamples, seed)


def _judged(measured: Sequence[Measured], slo: Slo) -> list[Judged]:
    return [judged_by(slo, one.point) for one in measured]


def _rates(
    a: Sequence[Measured], b: Sequence[Measured], slos: Sequence[Slo], resamples: int, seed: int
) -> list[AtRate]:
    common = sorted({_key(one) for one in a} & {_key(one) for one in b})
    found = []
    for rate, keys in itertools.groupby(common, key=lambda key: key[0]):
        seeds = tuple(number for _, number in keys)
        ours, theirs = ([one for one in side if one.rate_rps == rate and one.seed in seeds] for side in (a, b))
        differences = tuple(
            attainment_difference(_judged(ours, slo), _judged(theirs, slo), resamples, seed) for slo in slos
        )
        found.append(AtRate(rate, seeds, differences, quotients(_parts(ours), _parts(theirs), resamples, seed)))
    return found


def _key(one: Measured) -> tuple[float, int]:
    return one.rate_rps, one.seed


def _parts(measured: Sequence[Measured]) -> list[Part]:
    return [Part(one.seed, one.point.first, one.judged) for one in measured]
