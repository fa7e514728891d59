"""Goodput from simulated attainments."""

import pytest

from benchmarks.scheduling import SPAN, _goodput, rate_rps


@pytest.mark.parametrize("crossing", [-7.5, 0.5, 2.25, 30.75])
def test_goodput_is_where_attainment_crosses_its_target_between_two_rates(crossing: float) -> None:
    assert _goodput(lambda step: 0.9 - 0.01 * (step - crossing), 8) == pytest.approx(rate_rps(crossing, 8))


def test_a_target_that_no_rate_meets_is_a_goodput_of_nothing() -> None:
    assert _goodput(lambda step: 0.5, 8) == 0.0


def test_a_target_that_every_rate_meets_ends_at_the_highest() -> None:
    assert rate_rps(SPAN - 1, 8) <= _goodput(lambda step: 1.0, 8) <= rate_rps(SPAN, 8)
