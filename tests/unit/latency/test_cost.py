"""Latency models as coefficients."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.worker import StepCost
from splitserve.latency.catalog import costs
from splitserve.latency.cost import cost_of, latency_of
from splitserve.latency.fit import FittedLatency
from splitserve.latency.gpus import gpu
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import Step
from splitserve.latency.shape import shape

STEPS = [Step(), Step(500, 125_250, 1), Step(0, 0, 0, 40, 30_000), Step(100, 60_000, 2, 7, 900)]
FITTED = FittedLatency(0.005, 0.001, 2e-4, 300, 1e-5, 1e-9, 2e-4, 5e-4, 16, 1e-4, 3e-8, 2, "s", (), ())


@pytest.mark.parametrize(
    "latency", [LinearLatency(0.006, 2.5e-4, 5e-4, 3e-8, 1e-9), LinearLatency(0.01, 0.0, 0.0, stages=2), FITTED]
)
def test_fitted_and_linear_models_come_back_exactly(latency: LinearLatency | FittedLatency) -> None:
    back = latency_of(cost_of(latency))
    for step in STEPS:
        assert back.step_s(step) == pytest.approx(latency.step_s(step), rel=1e-12, abs=1e-15)
    assert back.stages == latency.stages


@given(st.builds(StepCost, *[st.floats(0.0, 1.0)] * 11, st.integers(1, 4)))
def test_no_coefficient_is_lost(cost: StepCost) -> None:
    assert cost_of(latency_of(cost)) == cost


def test_every_coefficient_is_one_of_the_fits() -> None:
    assert {field.name for field in fields(StepCost)} <= {field.name for field in fields(FittedLatency)}


def test_a_model_on_a_gpu_is_approximated() -> None:
    """Of what a router asks: whole prompts, decode steps of any batch."""
    known = costs(shape("llama-3.1-8b"), gpu("h100"), 1, 1)
    assert not isinstance(known, str)
    back = latency_of(cost_of(known.latency))
    for step in (Step(1024, 524_800, 1), Step(0, 0, 0, 8, 16_000), Step(0, 0, 0, 100, 100_000)):
        assert back.step_s(step) == pytest.approx(known.latency.step_s(step), rel=0.35)
