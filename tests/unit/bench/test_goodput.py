"""Goodput against curves worked out by hand, against a queue whose goodput is known, and its laws."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.bench.goodput import (
    Goodput,
    Judged,
    Point,
    attainment_difference,
    attainment_interval,
    curve_of,
    goodput,
    goodput_of,
    judged,
    ratio,
    ratio_of,
)
from splitserve.core.slo import Slo
from tests.unit.bench import queues

SLO = Slo(ttft_s=1.0, tpot_s=0.2, attainment=0.9)


def curve(*points: tuple[float, float], count: int = 100, seed: int = 0) -> list[Judged]:
    """Of each rate, the share of its requests that meet the objectives: the first ones."""
    return [Judged(rate, seed, np.arange(count) < round(share * count)) for rate, share in points]


# By hand --------------------------------------------------------------------------------------------------------------
def test_goodput_is_where_the_line_between_two_rates_crosses_the_target_in_log_rate() -> None:
    found = goodput_of(curve((1, 1.0), (2, 0.95), (4, 0.85), (8, 0.1)), 0.9)
    assert found.rps == pytest.approx(2 * math.sqrt(2))
    assert goodput_of(curve((2, 0.96), (4, 0.88)), 0.9).rps == pytest.approx(2 * 2**0.75)


def test_a_rate_that_just_meets_the_target_is_the_goodput() -> None:
    assert goodput_of(curve((1, 1.0), (2, 0.9), (3, 0.5)), 0.9).rps == 2.0
    last = goodput_of(curve((1, 1.0), (3, 0.9)), 0.9)
    assert (last.rps, last.at_least, last.high_open) == (3.0, True, True)
    assert 1.0 < last.low < 3.0


def test_a_higher_rate_that_did_better_is_pooled_with_the_one_below() -> None:
    points = curve((1, 1.0), (2, 0.88), (4, 0.96), (8, 0.8))
    found = curve_of(points)
    assert found.attainment == pytest.approx([1.0, 0.88, 0.96, 0.8])
    assert found.fitted == pytest.approx([1.0, 0.92, 0.92, 0.8])
    assert goodput_of(points, 0.9).rps == pytest.approx(4 * 2 ** (0.02 / 0.12))


def test_pools_are_weighted_by_requests_and_seeds_of_a_rate_are_one() -> None:
    points = [
        *curve((1, 1.0), (2, 0.7)),
        *curve((2, 0.9), (4, 0.9), count=300, seed=1),
        *curve((8, 0.2)),
    ]
    found = curve_of(points)
    assert found.requests.tolist() == [100, 400, 300, 100]
    assert found.attainment == pytest.approx([1.0, 0.85, 0.9, 0.2])
    pooled = (400 * 0.85 + 300 * 0.9) / 700
    assert found.fitted == pytest.approx([1.0, pooled, pooled, 0.2])


def test_rates_that_all_meet_the_target_are_a_lower_bound_and_none_an_upper() -> None:
    met = goodput_of(curve((1, 1.0), (2, 1.0)), 0.9)
    missed = goodput_of(curve((1, 0.0), (2, 0.0)), 0.9)
    assert met == Goodput(2.0, 2.0, 2.0, at_least=True, high_open=True)
    assert missed == Goodput(1.0, 1.0, 1.0, at_most=True, low_open=True)
    assert goodput_of(curve((5, 1.0)), 0.9) == Goodput(5.0, 5.0, 5.0, at_least=True, high_open=True)


def test_a_ratio_says_which_side_of_it_is_known() -> None:
    crossing, met, missed = curve((1, 1.0), (2, 0.5)), curve((1, 1.0), (2, 1.0)), curve((1, 0.0), (2, 0.0))
    sides = {
        "a b": ratio_of(crossing, crossing, 0.9),
        "a>": ratio_of(met, crossing, 0.9),
        "a<": ratio_of(missed, crossing, 0.9),
        "b>": ratio_of(crossing, met, 0.9),
        "b<": ratio_of(crossing, missed, 0.9),
        "a> b>": ratio_of(met, met, 0.9),
        "a> b<": ratio_of(met, missed, 0.9),
    }
    known = {name: (found.at_least, found.at_most) for name, found in sides.items()}
    assert known == {
        "a b": (False, False),
        "a>": (True, False),
        "a<": (False, True),
        "b>": (False, True),
        "b<": (True, False),
        "a> b>": (True, True),
        "a> b<": (True, False),
    }
    assert sides["a> b>"].unknown
    assert sides["a> b<"].value == 2.0


def test_the_objectives_of_an_slo_judge_the_points() -> None:
    points = [Point(1.0, 0, queues.timelines(np.array([0.5, 0.9, 1.1, 9.0])))]
    assert judged(points, SLO)[0].met.tolist() == [True, True, False, False]
    assert judged(points, replace(SLO, tpot_s=0.05))[0].met.tolist() == [False] * 4
    assert judged(points, replace(SLO, ttft_per_token_s=0.01))[0].met.tolist() == [True, True, True, False]


def test_attainment_has_an_interval() -> None:
    lines = queues.timelines(np.where(np.arange(200) % 5 == 0, 2.0, 0.5))
    found = attainment_interval(lines, SLO)
    assert found.value == pytest.approx(0.8)
    assert 0.76 < found.low <= 0.8 <= found.high < 0.84
    assert attainment_interval(lines, SLO) == found


def test_a_difference_of_attainment_is_paired() -> None:
    fate = np.random.default_rng(0).random(200)
    a, b = [Judged(1.0, 0, fate < 0.8)], [Judged(1.0, 0, fate < 0.7)]
    paired = attainment_difference(a, b)
    apart = attainment_difference(a, [Judged(1.0, 1, b[0].met)])
    assert paired.value == apart.value == pytest.approx((fate < 0.8).mean() - (fate < 0.7).mean())
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)
    assert attainment_difference(a, a) == replace(paired, value=0.0, low=0.0, high=0.0)


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ([], "at least one measured point"),
        ([Judged(2.0, 0, np.zeros(0, bool))], "2 requests/s has no requests"),
        ([Judged(0.0, 0, np.ones(3, bool))], "0 requests/s is not above 0"),
        ([Judged(math.nan, 0, np.ones(3, bool))], "is not above 0"),
    ],
)
def test_points_that_measured_nothing_are_refused(points: list[Judged], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        goodput_of(points, 0.9)


def test_points_of_one_seed_may_have_fewer_requests() -> None:
    """The warm-up of a faster run is more requests, and a run may be cut short."""
    whole = [queues.judged(rate, 0, 3.0) for rate in (0.5, 0.6, 0.7, 0.8, 0.9)]
    parts = [replace(point, met=point.met[10 * row : 200 - 5 * row], first=10 * row) for row, point in enumerate(whole)]
    found = goodput_of(parts, 0.9)
    assert found.low <= found.rps <= found.high
    assert curve_of(parts).requests.tolist() == [200, 185, 170, 155, 140]
    # A third of the resamples have none of these two: it takes both.
    few = [Judged(1.0, 0, np.ones(200, bool)), Judged(2.0, 0, np.ones(2, bool))]
    assert goodput_of(few, 0.9) == Goodput(2.0, 2.0, 2.0, at_least=True, high_open=True)
    assert ratio_of(parts, parts, 0.9) == replace(ratio_of(parts, parts, 0.9), value=1.0, low=1.0, high=1.0)


# Laws -----------------------------------------------------------------------------------------------------------------
RUNS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.5]),
        st.integers(0, 2),
        st.lists(st.floats(0.0, 3.0), min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=8,
)
SAID = list[tuple[float, int, list[float]]]


def points_of(said: SAID, scale: float = 1.0) -> list[Point]:
    return [Point(rate * scale, seed, queues.timelines(np.array(ttft_s))) for rate, seed, ttft_s in said]


@settings(deadline=None)
@given(said=RUNS, target=st.floats(0.05, 1.0), looser=st.floats(1.0, 2.0), less=st.floats(0.1, 1.0))
def test_a_looser_objective_never_has_a_lower_goodput(said: SAID, target: float, looser: float, less: float) -> None:
    points, slo = points_of(said), replace(SLO, attainment=target)
    found = goodput(points, slo, 20)
    assert goodput(points, replace(slo, ttft_s=slo.ttft_s * looser), 20).rps >= found.rps * (1 - 1e-12)
    assert goodput(points, replace(slo, attainment=target * less), 20).rps >= found.rps * (1 - 1e-12)


@settings(deadline=None)
@given(said=RUNS, seed=st.integers(0, 100))
def test_an_interval_holds_its_estimate_and_stays_among_the_rates_measured(said: SAID, seed: int) -> None:
    found = goodput(points_of(said), SLO, 30, seed)
    rates = [rate for rate, *_ in said]
    assert min(rates) <= found.low <= found.rps <= found.high <= max(rates)
    assert goodput(points_of(said), SLO, 30, seed) == found
    assert not (found.at_least and found.at_most)


@settings(deadline=None)
@given(said=RUNS)
def test_twice_the_rates_are_twice_the_goodput(said: SAID) -> None:
    found, twice = goodput(points_of(said), SLO, 30), goodput(points_of(said, 2.0), SLO, 30)
    scaled = (found.rps * 2, found.low * 2, found.high * 2)
    assert (twice.rps, twice.low, twice.high) == pytest.approx(scaled, rel=1e-12)
    assert (twice.at_least, twice.at_most) == (found.at_least, found.at_most)


@settings(deadline=None)
@given(said=RUNS)
def test_a_system_is_exactly_as_good_as_itself(said: SAID) -> None:
    found = ratio(points_of(said), points_of(said), SLO, 30)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


@settings(deadline=None)
@given(said=RUNS)
def test_the_fitted_curve_falls_and_keeps_the_share_of_all_requests(said: SAID) -> None:
    found = curve_of(judged(points_of(said), SLO))
    assert (np.diff(found.fitted) <= 1e-12).all()
    assert (found.fitted * found.requests).sum() == pytest.approx((found.attainment * found.requests).sum())
    if (np.diff(found.attainment) <= 0).all():
        assert (found.fitted == found.attainment).all()


# Where the truth is known ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("most_s", "least_share"), [(2.0, 0.8), (6.0, 0.65)])
def test_goodput_of_a_queue_is_found_and_mostly_covered(most_s: float, least_share: float) -> None:
    """Of one goodput the interval is too narrow where queues are long: see `resampling`."""
    truth = queues.true_goodput(most_s)
    rates = truth * 1.1 ** np.arange(-6, 7)
    found = [
        goodput_of([queues.judged(rate, 2 * run + seed, most_s) for rate in rates for seed in (0, 1)], 0.9, 200)
        for run in range(60)
    ]
    assert np.mean([one.rps for one in found]) == pytest.approx(truth, rel=0.04)
    assert np.mean([one.low <= truth <= one.high for one in found]) >= least_share


@pytest.mark.parametrize("most_s", [3.0, 6.0])
def test_a_ratio_of_two_queues_with_the_same_requests_is_covered(most_s: float) -> None:
    fast, slow = queues.true_goodput(most_s, 0.8), queues.true_goodput(most_s, 1.0)

    def runs(truth: float, service_s: float, run: int) -> list[Judged]:
        rates = truth * 1.1 ** np.arange(-6, 7)
        return [queues.judged(rate, 2 * run + seed, most_s, service_s) for rate in rates for seed in (0, 1)]

    found = [ratio_of(runs(fast, 0.8, run), runs(slow, 1.0, run), 0.9, 200) for run in range(60)]
    assert np.mean([one.value for one in found]) == pytest.approx(fast / slow, rel=0.02)
    assert np.mean([one.low <= fast / slow <= one.high for one in found]) >= 0.8
    # Apart, the same figures say much less: common requests are what makes a comparison sharp.
    apart = [
        ratio_of(runs(fast, 0.8, run), [replace(p, seed=p.seed + 10_000) for p in runs(slow, 1.0, run)], 0.9, 200)
        for run in range(10)
    ]
    width = np.mean([one.high - one.low for one in found[:10]])
    assert width < 0.6 * np.mean([one.high - one.low for one in apart])
