import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.slo import Slo
from splitserve.latency.linear import LinearLatency
from splitserve.planner.deployment import Deployment, Link, Role, WorkerSpec
from splitserve.planner.search.goodput import Trials, highest, interval
from tests.unit.planner.fixtures.questions import Mixed


@given(threshold=st.floats(0.5, 20.0), guess=st.floats(0.1, 30.0), step=st.sampled_from([0.02, 0.05, 0.2]))
def test_the_highest_rate_is_found_to_within_a_step_from_any_guess(threshold: float, guess: float, step: float) -> None:
    asked: list[float] = []

    def meets(rate: float) -> bool:
        asked.append(rate)
        return rate <= threshold

    found = highest(meets, guess, 20.0, step)
    assert found.low <= threshold
    assert threshold <= found.high
    assert found.high <= found.low * (1 + step)
    assert max(asked) <= 20.0
    assert len(asked) < 25


def test_a_rate_far_below_the_ceiling_is_none() -> None:
    assert highest(lambda rate: False, 5.0, 10.0, 0.05).low == 0.0


def test_what_meets_the_ceiling_is_not_asked_for_more() -> None:
    found = highest(lambda rate: True, 5.0, 10.0, 0.05)
    assert (found.low, found.high) == (10.0, 10.0)


def test_an_interval_is_students() -> None:
    """Mean 2, deviation 1, three values: half a width of 4.303 / sqrt(3)."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.high - found.mean) == pytest.approx((2.0, 2.4843), rel=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_a_single_value_has_no_width() -> None:
    assert interval([3.0]).low == interval([3.0]).high == 3.0


def _trials(ceiling_rps: float = 100.0) -> Trials:
    worker = WorkerSpec(Role.COLOCATED, LinearLatency(0.01, 1e-4, 1e-4), 10_000)
    return Trials(Deployment((worker,), 1.0, 4, Link(1e9), Link(1e9)), Mixed(), Slo(0.4, 0.05), 300, 7, ceiling_rps)


def test_no_simulation_is_made_twice() -> None:
    trials = _trials()
    trials.attainment(2.0)
    trials.attainment(2.0)
    assert trials.simulated == 300


def test_goodput_over_seeds_lies_near_where_attainment_crosses_the_target() -> None:
    trials = _trials()
    bracket = trials.bracket(5.0, 0.05)
    found = trials.goodput(bracket, 4, 0.05)
    assert trials.attainment(bracket.low) >= 0.9 > trials.attainment(bracket.high)
    assert found.low < found.mean < found.high
    assert bracket.low / 1.5 < found.mean < bracket.high * 1.5
    at_goodput = [trials.attainment(found.mean, seed) for seed in range(4)]
    assert sum(at_goodput) / 4 == pytest.approx(0.9, abs=0.05)


def test_goodput_never_exceeds_the_ceiling() -> None:
    trials = _trials(ceiling_rps=1.0)
    assert trials.goodput(trials.bracket(5.0, 0.05), 3, 0.05).high <= 1.0


def test_points_hold_every_rate_simulated_in_order() -> None:
    trials = _trials()
    for rate in (3.0, 1.0, 2.0):
        trials.attainment(rate)
    trials.attainment(2.0, 1)
    assert [point.rate_rps for point in trials.points()] == [1.0, 2.0, 3.0]
    assert all(0.0 <= point.attainment.low <= point.attainment.high <= 1.0 for point in trials.points())
