import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.latency.checks import falls, jumps, pooled
from splitserve.latency.curves import Curve

_TIMES = st.lists(st.floats(0.001, 100), min_size=1, max_size=20)


def test_a_fall_is_found_with_both_ends_and_the_remedy() -> None:
    (finding,) = falls("table", "batch", [94, 95, 96], [0.1312, 0.0930, 0.0935], "bridged")
    assert finding.where == "table"
    assert finding.sentence == "time falls from 131.2 to 93.0 ms between batch 94 and 95; bridged"


def test_noise_is_no_fall() -> None:
    assert falls("table", "batch", [1, 2], [0.100, 0.099], "bridged") == ()


def test_a_jump_is_found_and_growth_with_the_work_is_not() -> None:
    (finding,) = jumps("table", "batch", [1, 2, 4], [0.010, 0.035, 0.070])
    assert "jumps from 10.0 to 35.0 ms between batch 1 and 2" in finding.sentence


@given(_TIMES)
def test_pooled_values_never_fall_and_keep_their_sum(times: list[float]) -> None:
    never_falling = pooled(times)
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(never_falling))
    assert never_falling.sum() == pytest.approx(sum(times))


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=20))
def test_rising_values_are_kept(times: list[float]) -> None:
    assert pooled(sorted(times)).tolist() == sorted(times)


@given(_TIMES, st.lists(st.floats(-10, 50), min_size=2, max_size=9))
def test_a_curve_goes_through_its_points_and_never_falls(times: list[float], xs: list[float]) -> None:
    ys = pooled(times).tolist()
    curve = Curve.through(range(len(ys)), ys)
    assert [curve.of(x) for x in range(len(ys))] == pytest.approx(ys)
    values = [curve.of(x) for x in sorted(xs)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))


def test_a_curve_is_level_before_and_straight_after_its_points() -> None:
    curve = Curve.through([1, 2, 4], [1.0, 2.0, 6.0])
    assert [curve.of(x) for x in (-5, 1.5, 3, 10)] == [1.0, 1.5, 4.0, 18.0]


def test_points_that_fall_make_no_curve() -> None:
    with pytest.raises(AssertionError):
        Curve.through([1, 2], [2.0, 1.0])
