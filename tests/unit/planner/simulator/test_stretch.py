"""Many steps as one event."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.planner.simulator.stretch import Stretch

seconds = st.floats(1e-4, 1.0)
growth = st.floats(0.0, 1e-4)


@given(first_s=seconds, more_s=growth, steps=st.integers(1, 500))
def test_the_end_is_the_sum_of_the_steps(first_s: float, more_s: float, steps: int) -> None:
    one_by_one = sum(first_s + more_s * step for step in range(steps))
    assert Stretch(2.0, steps, first_s, more_s).end_of(steps) == pytest.approx(2.0 + one_by_one)


@given(first_s=seconds, more_s=growth, steps=st.integers(1, 500), share=st.floats(0.0, 1.0))
def test_the_boundary_after_a_moment_is_the_first_one_not_before_it(
    first_s: float, more_s: float, steps: int, share: float
) -> None:
    stretch = Stretch(0.0, steps, first_s, more_s)
    moment = share * stretch.end_of(steps)
    done = stretch.steps_by(moment)
    assert 1 <= done <= steps
    slack = 1e-6 * stretch.end_of(steps)
    assert stretch.end_of(done) >= moment - slack
    assert done == 1 or stretch.end_of(done - 1) <= moment + slack
