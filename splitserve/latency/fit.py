"""Fits a latency model to measured steps: least squares on the relative error, no coefficient below zero. Pure; numpy.

    step_s = fixed + (prefill_fixed if any prefill) + prompt tokens + pairs + chunks + decodes + context tokens

each times its coefficient; the line of prompt tokens, and of decodes, may break once. The break and the extra terms are
taken if they lower the error on samples left out of the fit by a twentieth, judged by cross-validation within the
training samples. A fifth of the samples, every fifth of each kind in order of size, is held out of all that; its errors
are what `FittedLatency` reports.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from splitserve.core.worker import StepCost
from splitserve.latency.model import Provenance, Step, Trust

_Array = npt.NDArray[np.float64]
_Mask = npt.NDArray[np.bool_]
_PAYS = 0.95  # of the error before
_HELD_OUT = 5  # every fifth
_FEWEST = 8


class Sample(NamedTuple):
    """One measured step, or the median of repeats."""

    step: Step
    seconds: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Relative errors (0.05 is 5%) on samples that the fit didn't see."""

    samples: int
    mean: float
    worst: float


class _Terms(NamedTuple):
    """Which terms a fit has; a break of 0 is none."""

    prefill_fixed: bool = False
    chunks: bool = False
    token_break: float = 0.0
    decode_break: float = 0.0


@dataclass(frozen=True, slots=True)
class FittedLatency(StepCost):
    """A step cost as a latency model: all stages are taken to be equally long."""

    source: str
    held_out: tuple[tuple[str, HeldOut], ...]  # by kind: prefill, decode, mixed
    hull: tuple[tuple[str, tuple[Step, Step]], ...]  # by kind: the least and the greatest of each field

    def step_s(self, step: Step) -> float:
        tokens, pairs, prefills, decodes, context = step
        if not tokens and not decodes:
            return 0.0
        seconds = self.fixed_s + self.decode_s * decodes + self.context_s * context
        if decodes > self.decode_break:
            seconds += self.decode_more_s * (decodes - self.decode_break)
        if tokens:
            seconds += self.prefill_fixed_s + self.token_s * tokens + self.pair_s * pairs + self.chunk_s * prefills
            if tokens > self.token_break:
                seconds += self.token_more_s * (tokens - self.token_break)
        return seconds

    def stage_s(self, step: Step) -> float:
        return self.step_s(step) / self.stages

    def provenance(self, step: Step) -> Provenance:
        """Interpolated within the samples of its kind, field by field; else extrapolated. The error is its kind's."""
        errors, boxes = dict(self.held_out), dict(self.hull)
        kind = kind_of(step)
        error = errors[kind].mean if kind in errors else None
        trust = Trust.INTERPOLATED if kind in boxes and _within(step, boxes[kind]) else Trust.EXTRAPOLATED
        return Provenance(trust, self.source, error)


def kind_of(step: Step) -> str:
    """prefill, decode or mixed."""
    if step.prompt_tokens:
        return "mixed" if step.decodes else "prefill"
    return "decode"


def fit(samples: Iterable[Sample], source: str, stages: int = 1) -> FittedLatency:
    """The model of these samples. Repeats of a step count as their median. The same samples give the same fit, in
    whatever order. Raises ValueError if there are fewer than eight different steps."""
    steps, seconds = _medians(samples)
    if len(steps) < _FEWEST:
        raise ValueError(f"{len(steps)} different steps are too few to fit; at least {_FEWEST} are needed")
    held = _held_out(steps)
    work, took = np.array(steps, dtype=np.float64), np.array(seconds)
    terms = _chosen(work[~held], took[~held])
    model = _model(terms, _solved(terms, work[~held], took[~held]), source, stages, steps)
    return _with_errors(model, [step for step, out in zip(steps, held, strict=True) if out], took[held])


def nnls(matrix: _Array, target: _Array) -> _Array:
    """argmin |matrix x - target| with x >= 0, by active sets (Lawson and Hanson, Solving Least Squares Problems, 1974,
    chapter 23). Columns are scaled to length one inside."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    x = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(3 * matrix.shape[1]):
        gradient = scaled.T @ (target - scaled @ x)
        gradient[free] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10 * max(float(np.linalg.norm(target)), 1e-300):
            break
        free[best] = True
        x, free = _settled(scaled, target, x, free)
    solved: _Array = x / scale
    return solved


def _settled(
    matrix: _Array, target: _Array, x: _Array, free: npt.NDArray[np.bool_]
) -> tuple[_Array, npt.NDArray[np.bool_]]:
    """The free columns' least squares, giving up those that it would make negative."""
    while free.any():
        trial = np.zeros_like(x)
        trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        below = free & (trial <= 0)
        if not below.any():
            return trial, free
        step = float(np.min(x[below] / np.maximum(x[below] - trial[below], 1e-300)))
        x = x + step * (trial - x)
        free = free & (x > 1e-15)
        x = np.where(free, x, 0.0)
    return np.zeros_like(x), free


# samples


def _medians(samples: Iterable[Sample]) -> tuple[list[Step], list[float]]:
    repeats: dict[Step, list[float]] = {}
    for step, seconds in samples:
        if step.prompt_tokens or step.decodes:
            repeats.setdefault(step, []).append(seconds)
    steps = sorted(repeats, key=lambda step: (kind_of(step), step))
    return steps, [float(np.median(repeats[step])) for step in steps]


def _held_out(steps: Sequence[Step]) -> _Mask:
    """Every fifth of each kind, from the third: never a kind's smallest."""
    held, seen = [], dict.fromkeys(("prefill", "decode", "mixed"), 0)
    for step in steps:
        seen[kind_of(step)] += 1
        held.append(seen[kind_of(step)] % _HELD_OUT == 3)
    return np.array(held)


# fitting


def _columns(terms: _Terms, work: _Array) -> _Array:
    """Of all terms, those not taken being zero: fixed, prefill fixed, tokens below and above the break, pairs, chunks,
    decodes below and above the break, context."""
    tokens, pairs, chunks, decodes, context = work.T
    below, above = _broken(tokens, terms.token_break)
    few, many = _broken(decodes, terms.decode_break)
    prefill = (tokens > 0) * float(terms.prefill_fixed)
    return np.stack(
        [np.ones(len(work)), prefill, below, above, pairs, chunks * terms.chunks, few, many, context], axis=1
    )


def _broken(values: _Array, at: float) -> tuple[_Array, _Array]:
    if not at:
        return values, np.zeros_like(values)
    return np.minimum(values, at), np.maximum(values - at, 0.0)


def _solved(terms: _Terms, work: _Array, took: _Array) -> _Array:
    return nnls(_columns(terms, work) / took[:, None], np.ones(len(took)))


def _chosen(work: _Array, took: _Array) -> _Terms:
    """Adds the term that helps most until none pays."""
    terms, error = _Terms(), _crossed(_Terms(), work, took)
    while True:
        tried = [(_crossed(more, work, took), more) for more in _more(terms, work)]
        best, more = min(tried, default=(np.inf, terms))
        if best > _PAYS * error:
            return terms
        terms, error = more, best


def _more(terms: _Terms, work: _Array) -> list[_Terms]:
    tokens, decodes = work[:, 0], work[:, 3]
    more = []
    if not terms.prefill_fixed and (tokens > 0).any() and (tokens == 0).any():
        more.append(terms._replace(prefill_fixed=True))
    if not terms.chunks and (work[:, 2] > 1).any():
        more.append(terms._replace(chunks=True))
    if not terms.token_break:
        more += [terms._replace(token_break=at) for at in _inner(tokens)]
    if not terms.decode_break:
        more += [terms._replace(decode_break=at) for at in _inner(decodes)]
    return more


def _inner(values: _Array) -> list[float]:
    """Where a line may break: at sampled values with two others on each side."""
    distinct = np.unique(values[values > 0])
    return [float(value) for value in distinct[2:-2]]


def _crossed(terms: _Terms, work: _Array, took: _Array) -> float:
    """Mean relative error over four folds, each predicted from the other three."""
    errors = np.zeros(len(took))
    folds = np.arange(len(took)) % 4
    for fold in range(4):
        out = folds == fold
        coefficients = _solved(terms, work[~out], took[~out])
        errors[out] = np.abs(_columns(terms, work[out]) @ coefficients / took[out] - 1)
    return float(errors.mean())


def _model(terms: _Terms, x: _Array, source: str, stages: int, steps: Sequence[Step]) -> FittedLatency:
    fixed, prefill, token, token_above, pair, chunk, decode, decode_above, context = map(float, x)
    return FittedLatency(
        fixed_s=fixed,
        prefill_fixed_s=prefill,
        token_s=token,
        token_break=terms.token_break or float("inf"),
        token_more_s=token_above - token if terms.token_break else 0.0,
        pair_s=pair,
        chunk_s=chunk,
        decode_s=decode,
        decode_break=terms.decode_break or float("inf"),
        decode_more_s=decode_above - decode if terms.decode_break else 0.0,
        context_s=context,
        stages=stages,
        source=source,
        held_out=(),
        hull=_boxes(steps),
    )


def _boxes(steps: Sequence[Step]) -> tuple[tuple[str, tuple[Step, Step]], ...]:
    kinds: dict[str, list[Step]] = {}
    for step in steps:
        kinds.setdefault(kind_of(step), []).append(step)
    return tuple((kind, (_each(min, of), _each(max, of))) for kind, of in kinds.items())


def _each(choose: Callable[..., int], steps: Sequence[Step]) -> Step:
    return Step(*(choose(values) for values in zip(*steps, strict=True)))


def _within(step: Step, box: tuple[Step, Step]) -> bool:
    return all(low <= value <= high for low, value, high in zip(box[0], step, box[1], strict=True))


def _with_errors(model: FittedLatency, steps: Sequence[Step], took: _Array) -> FittedLatency:
    errors: dict[str, list[float]] = {}
    for step, seconds in zip(steps, took, strict=True):
        errors.setdefault(kind_of(step), []).append(abs(model.step_s(step) / seconds - 1))
    return replace(
        model,
        held_out=tuple((kind, HeldOut(len(of), sum(of) / len(of), max(of))) for kind, of in errors.items()),
    )
