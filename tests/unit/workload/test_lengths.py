import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.errors import ConfigError
from splitserve.workload.lengths import (
    LONGEST_TOKENS,
    Lengths,
    empirical,
    fixed,
    from_quantiles,
    lognormal,
    lognormal_of,
    of_shares,
    spread_lognormal,
    truncated,
    uniform,
)


def drawn(lengths: Lengths, count: int = 50_000, seed: int = 0) -> np.ndarray:
    return lengths.draw(count, np.random.default_rng(seed))


def test_fixed_lengths_are_always_the_same() -> None:
    assert set(drawn(fixed(512), 100).tolist()) == {512}


def test_uniform_lengths_reach_both_ends_and_no_further() -> None:
    tokens = drawn(uniform(3, 9))
    assert (tokens.min(), tokens.max()) == (3, 9)
    assert np.bincount(tokens)[3:] / len(tokens) == pytest.approx(np.full(7, 1 / 7), abs=0.01)


def test_an_empirical_distribution_gives_lengths_as_often_as_they_occurred() -> None:
    tokens = drawn(empirical(np.array([5, 5, 5, 90])))
    assert set(tokens.tolist()) == {5, 90}
    assert (tokens == 5).mean() == pytest.approx(0.75, abs=0.01)


def test_a_lognormal_has_the_mean_asked_for_after_the_limits_cut() -> None:
    lengths = lognormal(700, 1.0, low=10, high=2000)
    assert lengths.mean == pytest.approx(700, rel=1e-6)
    assert drawn(lengths).mean() == pytest.approx(700, rel=0.02)
    uncut = lognormal_of(math.log(700) - 0.5, 1.0, 10, 2000)
    assert uncut.mean < 600  # what the mean would be without the correction


def test_a_lognormals_median_and_p90_are_those_of_the_formula() -> None:
    lengths = lognormal(1000, 0.5, high=100_000)
    mu = math.log(1000) - 0.125
    assert lengths.at(0.5) == pytest.approx(math.exp(mu), rel=0.002)
    assert lengths.at(0.9) == pytest.approx(math.exp(mu + 1.2815516 * 0.5), rel=0.002)


def test_spread_lognormal_meets_mean_and_deviation_within_limits() -> None:
    lengths = spread_lognormal(2048, 1973, 3, 7437)
    assert lengths.mean == pytest.approx(2048, rel=1e-6)
    assert lengths.deviation == pytest.approx(1973, rel=1e-3)


def test_a_deviation_out_of_reach_gives_the_widest_there_is() -> None:
    lengths = spread_lognormal(50, 1000, 1, 100)
    assert lengths.mean == pytest.approx(50, rel=1e-6)
    assert 20 < lengths.deviation < 50


def test_quantiles_are_met_exactly() -> None:
    lengths = from_quantiles({0.5: 200, 0.9: 900, 0.99: 2000})
    assert lengths.at([0.5, 0.9, 0.99]).tolist() == [200, 900, 2000]


def test_between_two_quantiles_lengths_are_lognormal() -> None:
    lengths = from_quantiles({0.5: 1000, 0.9: 3000})
    sigma = math.log(3) / 1.2815516
    assert lengths.at(0.75) == pytest.approx(1000 * math.exp(0.67449 * sigma), rel=0.002)
    assert lengths.at(0.1) == pytest.approx(1000 / 3, rel=0.005)  # beyond the outer ones it goes on as between them


def test_equal_quantiles_are_a_step() -> None:
    lengths = from_quantiles({0.1: 50, 0.5: 300, 0.9: 300})
    assert lengths.at([0.5, 0.6, 0.75, 0.9]).tolist() == [300, 300, 300, 300]


def test_p0_and_p100_are_the_limits() -> None:
    lengths = from_quantiles({0.0: 100, 0.5: 200, 0.9: 900, 1.0: 1000})
    assert lengths.at([1e-9, 1.0]).tolist() == [100, 1000]
    assert lengths.at([0.5, 0.9]).tolist() == [200, 900]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20_000), min_size=2, max_size=5), st.floats(0.2, 0.5))
def test_any_rising_quantiles_are_met_to_a_token(values: list[int], first: float) -> None:
    levels = np.linspace(first, 0.95, len(values))
    asked = dict(zip(levels.tolist(), sorted(values), strict=True))
    lengths = from_quantiles(asked)
    found = lengths.at(np.minimum(levels + 1e-6, 1.0))
    assert np.all(np.abs(found - np.array(sorted(values))) <= 1)
    assert np.all(np.diff(lengths.cumulative) >= 0)


def test_truncating_leaves_the_rest_as_often_relative_to_each_other() -> None:
    lengths = truncated(empirical(np.array([1, 5, 5, 9, 40])), 2, 10)
    assert lengths.shares[[1, 5, 9]] == pytest.approx([0, 2 / 3, 1 / 3])


def test_truncating_everything_away_is_an_error() -> None:
    with pytest.raises(ConfigError, match="none is left"):
        truncated(fixed(5), 6, 10)


def test_the_same_seed_draws_the_same_lengths_and_another_does_not() -> None:
    lengths = lognormal(300, 1.0)
    assert np.array_equal(drawn(lengths, seed=3), drawn(lengths, seed=3))
    assert not np.array_equal(drawn(lengths, seed=3), drawn(lengths, seed=4))


def test_no_length_is_drawn_whose_share_is_nothing() -> None:
    lengths = of_shares(np.array([0.0, 0.0, 1.0, 0.0, 1.0, 0.0]))
    assert lengths.at([np.nextafter(0, 1), 0.5, 0.75, 1.0]).tolist() == [2, 2, 4, 4]
    assert set(drawn(lengths, 1000).tolist()) == {2, 4}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: fixed(0), "0 tokens: a prompt and an output have at least 1"),
        (lambda: uniform(9, 3), r"longest \(3 tokens\) is shorter than the shortest \(9\)"),
        (lambda: fixed(LONGEST_TOKENS + 1), "the longest that is modelled"),
        (lambda: lognormal(700, 0.0), "sigma: 0 is not between"),
        (lambda: lognormal(700, 1.0, high=600), "mean: 700 tokens is not between the limits, 1 and 600"),
        (lambda: lognormal(-1, 1.0), "mean: -1 tokens"),
        (lambda: lognormal(math.nan, 1.0), "mean: nan tokens"),
        (lambda: from_quantiles({0.5: 200}), "give at least two"),
        (lambda: from_quantiles({0.5: 200, 0.9: 100}), "p90=100 is below p50=200"),
        (lambda: from_quantiles({0.5: 200, 1.2: 300}), "p120 is not between"),
        (lambda: from_quantiles({0.5: 0, 0.9: 300}), "p50=0: give 1 to"),
    ],
)
def test_lengths_that_cannot_be_are_an_error(make: object, sentence: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=sentence):
        make()
