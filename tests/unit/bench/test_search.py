"""Which run is next, on curves that are known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.bench.goodput import Judged
from splitserve.bench.search import Bracket, Finished, Options, Wanted, bracket, next_run
from splitserve.core.errors import ConfigError


def point(rate: float, share: float, seed: int = 0) -> Judged:
    return Judged(rate, seed, np.arange(200) < round(share * 200))


def searched(goodput_rps: float, options: Options) -> tuple[list[tuple[float, int]], Finished]:
    """Of a system that meets all objectives up to a rate, and none above."""
    points: list[Judged] = []
    while isinstance(step := next_run(points, 0.9, options), Wanted):
        points.append(point(step.rate_rps, 1.0 if step.rate_rps <= goodput_rps else 0.0, step.seed))
        assert len(points) < 100
    return [(one.rate_rps, one.seed) for one in points], step


def test_it_doubles_until_one_misses_and_halves_what_is_between() -> None:
    asked, end = searched(5.0, Options(start_rps=1.0, step=0.1, seeds=(7,)))
    assert [rate for rate, _ in asked] == [1.0, 2.0, 4.0, 8.0, 5.657, 4.757, 5.188]
    assert {seed for _, seed in asked} == {7}
    assert end == Finished()


def test_it_halves_from_a_start_that_is_too_fast() -> None:
    asked, _ = searched(0.3, Options(start_rps=1.0, step=1.0, seeds=(0,)))
    assert asked == [(1.0, 0), (0.5, 0), (0.25, 0)]


def test_the_two_rates_around_goodput_get_the_other_seeds() -> None:
    asked, _ = searched(3.0, Options(start_rps=2.0, step=0.5, seeds=(0, 5, 6)))
    assert asked == [(2.0, 0), (4.0, 0), (2.828, 0), (2.828, 5), (4.0, 5), (2.828, 6), (4.0, 6)]


def test_a_seed_that_moves_goodput_is_followed() -> None:
    points = [point(2.0, 1.0), point(2.1, 0.8), point(1.0, 1.0), point(4.0, 0.0)]
    options = Options(seeds=(0, 1))
    assert next_run(points, 0.9, options) == Wanted(2.0, 1, 2)
    moved = [*points, point(2.0, 0.6, 1)]
    assert bracket(moved, 0.9) == Bracket(1.0, 2.0)
    assert next_run(moved, 0.9, options) == Wanted(1.414, 0, 5)


@pytest.mark.parametrize(
    ("goodput_rps", "why"),
    [
        (1e6, "even 50 requests/s, the highest rate allowed, met"),
        (1e-6, "even 0.2 requests/s, the lowest rate allowed"),
    ],
)
def test_it_ends_at_the_rates_allowed_and_says_so(goodput_rps: float, why: str) -> None:
    asked, end = searched(goodput_rps, Options(lowest_rps=0.2, highest_rps=50.0))
    assert why in end.why
    assert len(asked) == len(set(asked)) <= 7


def test_given_rates_are_run_with_every_seed_and_nothing_else() -> None:
    options = Options(rates_rps=(3.0, 1.0), seeds=(0, 1))
    assert searched(2.0, options) == ([(3.0, 0), (1.0, 0), (3.0, 1), (1.0, 1)], Finished())


@given(
    goodput_rps=st.floats(0.02, 5000.0),
    start=st.floats(0.02, 5000.0),
    step=st.floats(0.01, 1.0),
    seeds=st.integers(1, 3),
)
def test_goodput_is_enclosed_within_a_step_and_no_run_made_twice(
    goodput_rps: float, start: float, step: float, seeds: int
) -> None:
    asked, end = searched(goodput_rps, Options(start_rps=start, step=step, seeds=tuple(range(seeds))))
    assert end == Finished()
    assert len(asked) == len(set(asked))
    points = [point(rate, 1.0 if rate <= goodput_rps else 0.0, seed) for rate, seed in asked]
    found = bracket(points, 0.9)
    assert found.met_rps is not None
    assert found.missed_rps is not None
    assert found.met_rps <= goodput_rps < found.missed_rps <= found.met_rps * (1 + step) * 1.0011
    assert len(asked) <= 2 + abs(math.log2(goodput_rps / start)) + 7 + 2 * seeds


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"start_rps": 0.0}, "start_rps: is to be between the lowest rate"),
        ({"start_rps": 5.0, "highest_rps": 2.0}, "start_rps"),
        ({"step": 0.0}, "step: 0 is not between 0.01 and 1"),
        ({"step": math.nan}, "step"),
        ({"seeds": ()}, "seeds: are to be at least one"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"rates_rps": (1.0, -1.0)}, "rates_rps: are to be above 0"),
        ({"warm_up_s": -1.0}, "warm_up_s"),
    ],
)
def test_options_that_can_not_be_are_named(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Options(**wrong)  # type: ignore[arg-type]
