import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.latency.fit import FittedLatency, Sample, fit, kind_of, nnls
from splitserve.latency.model import PrefillChunk, Step, Trust

_PREFILLS = [Step.of([PrefillChunk(n)] * b) for n in (16, 64, 128, 256, 512, 1024) for b in (1, 2, 4)]
_DECODES = [Step.of(decodes=[c] * b) for b in (1, 2, 4, 8, 16, 32) for c in (64, 256, 1024)]
_MIXED = [Step.of([PrefillChunk(n, 100)], [300] * b) for n in (64, 256) for b in (2, 8, 16)]
_GRID = _PREFILLS + _DECODES + _MIXED


def _linear(step: Step) -> float:
    tokens, pairs, _, decodes, context = step
    return 5e-3 + 2e-5 * tokens + 1e-9 * pairs + 1e-4 * decodes + 2e-8 * context


def _bent(step: Step) -> float:
    """A batch costs more from 8 sequences on, and prefill has a constant of its own."""
    return _linear(step) + 1e-3 * max(step.decodes - 8, 0) + (4e-3 if step.prompt_tokens else 0)


def _samples(steps: list[Step], seconds: object = _linear) -> list[Sample]:
    assert callable(seconds)
    return [Sample(step, seconds(step)) for step in steps]


def _errors(model: FittedLatency) -> dict[str, float]:
    return {kind: held.mean for kind, held in model.held_out}


def test_a_linear_worker_is_found_again() -> None:
    model = fit(_samples(_GRID), "test")
    assert model.fixed_s == pytest.approx(5e-3, rel=1e-6)
    assert model.token_s == pytest.approx(2e-5, rel=1e-6)
    assert model.pair_s == pytest.approx(1e-9, rel=1e-6)
    assert model.decode_s == pytest.approx(1e-4, rel=1e-6)
    assert model.context_s == pytest.approx(2e-8, rel=1e-6)
    assert _errors(model) == {kind: pytest.approx(0, abs=1e-6) for kind in ("prefill", "decode", "mixed")}


def test_a_bend_and_a_prefill_constant_are_taken_where_they_pay() -> None:
    model = fit(_samples(_GRID, _bent), "test")
    assert model.decode_break == 8
    assert model.prefill_fixed_s == pytest.approx(4e-3, rel=1e-3)
    assert max(_errors(model).values()) < 1e-3


def test_a_term_that_does_not_pay_is_not_taken() -> None:
    model = fit(_samples(_GRID), "test")
    assert (model.prefill_fixed_s, model.chunk_s, model.decode_break) == (0, 0, float("inf"))


def test_the_held_out_error_is_of_steps_that_the_fit_did_not_see() -> None:
    spoilt = _samples(_GRID)
    third = sorted((s for s in spoilt if kind_of(s.step) == "decode"), key=lambda s: s.step)[2]
    spoilt[spoilt.index(third)] = Sample(third.step, 2 * third.seconds)
    clean, dirty = fit(_samples(_GRID), "test"), fit(spoilt, "test")
    assert (dirty.fixed_s, dirty.token_s, dirty.decode_s) == (clean.fixed_s, clean.token_s, clean.decode_s)
    assert dict(dirty.held_out)["decode"].worst == pytest.approx(0.5, abs=1e-6)


def test_the_order_of_samples_changes_nothing_and_repeats_count_as_their_median() -> None:
    samples = _samples(_GRID, _bent)
    shuffled = [*samples, *samples, *(Sample(s.step, 50 * s.seconds) for s in samples)]
    random.Random(3).shuffle(shuffled)
    assert fit(shuffled, "test") == fit(samples, "test")


def test_a_step_within_the_samples_is_interpolated_and_outside_extrapolated() -> None:
    model = fit(_samples(_PREFILLS + _DECODES), "test")
    assert model.provenance(Step.of([PrefillChunk(300)])).trust is Trust.INTERPOLATED
    assert model.provenance(Step.of([PrefillChunk(5000)])).trust is Trust.EXTRAPOLATED
    assert model.provenance(Step.of(decodes=[100] * 33)).trust is Trust.EXTRAPOLATED
    mixed = model.provenance(Step.of([PrefillChunk(64)], [100]))
    assert (mixed.trust, mixed.error) == (Trust.EXTRAPOLATED, None)
    assert model.provenance(Step.of(decodes=[100])).error == _errors(model)["decode"]


def test_stages_are_equally_long() -> None:
    model = fit(_samples(_GRID), "test", stages=4)
    assert model.stage_s(_GRID[0]) == model.step_s(_GRID[0]) / 4


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="7 different steps are too few to fit"):
        fit(_samples(_GRID[:7] * 9), "test")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_noise_makes_no_coefficient_negative(seed: int) -> None:
    noise = np.random.default_rng(seed)
    model = fit([Sample(step, _linear(step) * noise.lognormal(0, 0.3)) for step in _GRID], "test")
    slopes = (model.fixed_s, model.prefill_fixed_s, model.token_s, model.pair_s, model.chunk_s, model.decode_s)
    assert min(*slopes, model.context_s, model.token_s + model.token_more_s, model.decode_s + model.decode_more_s) >= 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 12), st.integers(1, 6))
def test_nnls_meets_the_conditions_of_a_minimum(seed: int, rows: int, columns: int) -> None:
    draw = np.random.default_rng(seed)
    matrix, target = draw.normal(size=(rows, columns)), draw.normal(size=rows)
    x = nnls(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    assert (x >= 0).all()
    assert (gradient > -1e-6).all(), "no coefficient at zero would help by growing"
    assert np.abs(gradient[x > 0]).max(initial=0) < 1e-6, "those above zero are at their best"
