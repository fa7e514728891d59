"""Median and 99th percentile of TTFT, TPOT and ITL of two systems that served the same requests, and how they compare.

Pure. A request that never had a first token has an infinite TTFT and one that did not end an infinite TPOT, as in
`core/slo`; ITL is what could be seen: the gaps between chunks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitserve.bench.goodput import RESAMPLES
from splitserve.bench.resampling import CONFIDENCE, Resamples, Span, drawn
from splitserve.bench.run import Run

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

QUANTILES = (0.5, 0.99)
_CELLS = 4_000_000  # resamples times values: more of these take seconds


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One run, of which `first` is the number of its first request among those its seed sent."""

    seed: int
    first: int
    run: Run

    @property
    def span(self) -> Span:
        return Span(self.seed, self.first, len(self.run))


@dataclass(frozen=True, slots=True)
class Quotient:
    """Of `what`, such as TTFT, at one quantile: both systems' values in seconds, a over b, and the bounds of its 95%
    interval. Infinite or 0 where only one of them never got so far at that quantile, NaN where neither did."""

    what: str
    quantile: float
    a_s: float
    b_s: float
    value: float
    low: float
    high: float


def quotients(a: Sequence[Part], b: Sequence[Part], resamples: int = RESAMPLES, seed: int = 0) -> tuple[Quotient, ...]:
    """Of TTFT, TPOT and ITL, at each of `QUANTILES`. Runs of one seed are resampled together. None of what either has
    no values of, such as gaps where all came at once."""
    draws = drawn((part.span for part in (*a, *b)), resamples, seed)
    return tuple(
        quotient
        for what, column in _COLUMNS.items()
        for quotient in _quotients(what, _values(a, draws, column), _values(b, draws, column))
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Values:
    """Rising; `passed[b, i]` is how many of resample b are no longer than value i."""

    seconds: Floats
    passed: npt.NDArray[np.int32]

    def at(self, quantile: float) -> Floats:
        """Of each resample, the smallest value that such a share is no longer than; NaN without any."""
        ranks = np.maximum(np.ceil(quantile * self.passed[:, -1]), 1.0)
        found = [np.searchsorted(passed, rank) for passed, rank in zip(self.passed, ranks, strict=True)]
        return np.asarray(np.append(self.seconds, np.nan)[found])


def _values(parts: Sequence[Part], draws: Mapping[int, Resamples], column: "_Column") -> _Values:
    columns = [column(part.run) for part in parts]
    seconds = np.concatenate([values for _, values in columns])
    offsets = np.cumsum([0, *(len(part.run) for part in parts)])
    owners = np.concatenate([own + offset for (own, _), offset in zip(columns, offsets, strict=False)])
    rows = 1 + max(1, _CELLS // max(1, len(seconds)))
    counts = np.concatenate([draws[part.seed].of(part.span)[:rows] for part in parts], axis=1).astype(np.int32)
    order = np.argsort(seconds, kind="stable")
    return _Values(seconds[order], np.cumsum(np.take(counts, owners[order], axis=1), axis=1, dtype=np.int32))


def _quotients(what: str, a: _Values, b: _Values) -> list[Quotient]:
    if not len(a.seconds) or not len(b.seconds):
        return []
    return [_quotient(what, quantile, a.at(quantile), b.at(quantile)) for quantile in QUANTILES]


def _quotient(what: str, quantile: float, a_s: Floats, b_s: Floats) -> Quotient:
    rows = min(len(a_s), len(b_s))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = a_s[:rows] / b_s[:rows]
    low, high = _interval(values)
    return Quotient(what, quantile, float(a_s[0]), float(b_s[0]), float(values[0]), low, high)


def _interval(values: Floats) -> tuple[float, float]:
    """As `resampling.interval`, of values that may be infinite, which have no middle between them."""
    rising = np.sort(values[1:][~np.isnan(values[1:])])
    if not len(rising) or np.isnan(values[0]):
        return float("nan"), float("nan")
    tail = (1.0 - CONFIDENCE) / 2
    low, high = (rising[round(level * (len(rising) - 1))] for level in (tail, 1.0 - tail))
    return min(float(low), float(values[0])), max(float(high), float(values[0]))


_Column = Callable[[Run], tuple[Ints, Floats]]
"""Whose each value is, by row of the run, and the values."""


def _ttft(run: Run) -> tuple[Ints, Floats]:
    return np.arange(len(run)), run.timelines.ttft_s


def _tpot(run: Run) -> tuple[Ints, Floats]:
    return np.arange(len(run)), run.timelines.tpot_s


def _itl(run: Run) -> tuple[Ints, Floats]:
    gaps = np.maximum(np.bincount(run.chunks.request, minlength=len(run)) - 1, 0)
    return np.repeat(np.arange(len(run)), gaps), run.chunks.gaps_s()


_COLUMNS: Mapping[str, _Column] = {"TTFT": _ttft, "TPOT": _tpot, "ITL": _itl}
