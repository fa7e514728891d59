import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.errors import ConfigError
from splitserve.workload.arrivals import Arrivals, Constant, Diurnal, Gamma, Poisson, Seconds, rescaled

EVERY = [Constant(), Poisson(), Gamma(0.5), Gamma(3.0), Diurnal(1.8, 600.0)]


def times(arrivals: Arrivals, rate_rps: float = 5.0, count: int = 20_000, seed: int = 0) -> Seconds:
    return arrivals.times(count, rate_rps, np.random.default_rng(seed))


def cv(arrival_s: Seconds) -> float:
    gaps_s = np.diff(arrival_s)
    return float(gaps_s.std() / gaps_s.mean())


@pytest.mark.parametrize("arrivals", EVERY, ids=str)
def test_arrivals_come_in_order_at_the_rate_asked_for(arrivals: Arrivals) -> None:
    arrival_s = times(arrivals)
    assert np.all(np.diff(arrival_s) >= 0)
    assert arrival_s[0] >= 0
    assert len(arrival_s) / arrival_s[-1] == pytest.approx(5.0, rel=0.06)


@pytest.mark.parametrize("arrivals", EVERY, ids=str)
def test_the_same_seed_gives_the_same_arrivals_and_fewer_are_the_first_of_more(arrivals: Arrivals) -> None:
    assert np.array_equal(times(arrivals, count=50), times(arrivals, count=500)[:50])


@pytest.mark.parametrize("arrivals", [Constant(), Poisson(), Gamma(3.0)], ids=str)
def test_a_rate_scales_the_same_arrivals(arrivals: Arrivals) -> None:
    assert times(arrivals, 4.0) == pytest.approx(times(arrivals, 1.0) / 4.0)


@pytest.mark.parametrize(
    ("arrivals", "expected"), [(Constant(), 0.0), (Poisson(), 1.0), (Gamma(0.5), 0.5), (Gamma(3.0), 3.0)]
)
def test_burstiness_is_the_coefficient_of_variation(arrivals: Arrivals, expected: float) -> None:
    assert cv(times(arrivals)) == pytest.approx(expected, abs=0.12)


def test_gamma_of_one_is_as_bursty_as_poisson() -> None:
    assert cv(times(Gamma(1.0))) == pytest.approx(cv(times(Poisson())), abs=0.05)


def test_diurnal_traffic_peaks_a_quarter_into_its_period_and_is_least_at_three_quarters() -> None:
    arrival_s = times(Diurnal(peak=1.8, period_s=100.0), rate_rps=50.0, count=100_000)
    counts, _ = np.histogram(arrival_s % 100.0, bins=20, range=(0.0, 100.0))
    expected = 1.0 + 0.8 * np.sin(2 * np.pi * (np.arange(20) + 0.5) / 20)
    assert counts / counts.mean() == pytest.approx(expected, abs=0.06)


def test_diurnal_traffic_with_a_peak_of_one_is_poisson() -> None:
    assert times(Diurnal(1.0, 600.0)) == pytest.approx(times(Poisson()), rel=1e-9)


def test_the_period_of_the_day_does_not_scale_with_the_rate() -> None:
    day = Diurnal(2.0, 100.0)
    for rate_rps in (20.0, 80.0):
        phase = times(day, rate_rps) % 100.0
        assert ((phase > 70.0) & (phase < 80.0)).mean() < 0.02  # the trough, where the rate is 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50), st.floats(0.1, 100))
def test_a_trace_rescaled_has_the_rate_and_its_own_shape(recorded: list[float], rate_rps: float) -> None:
    arrival_s = np.sort(np.array(recorded))
    scaled = rescaled(arrival_s, rate_rps)
    assert scaled[0] == 0.0
    if arrival_s[-1] - arrival_s[0] > 1e-3:
        assert (len(scaled) - 1) / scaled[-1] == pytest.approx(rate_rps)
        shape = (arrival_s - arrival_s[0]) / (arrival_s[-1] - arrival_s[0])
        assert scaled / scaled[-1] == pytest.approx(shape, abs=1e-9)


def test_a_trace_without_duration_comes_at_once() -> None:
    assert rescaled(np.array([5.0, 5.0]), 2.0).tolist() == [0.0, 0.0]
    assert rescaled(np.array([5.0]), 2.0).tolist() == [0.0]
    assert rescaled(np.array([0.0, 2e-311]), 1.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Gamma(0.0), "cv: 0 is not between 0.05 and 20"),
        (lambda: Gamma(float("nan")), "cv: nan"),
        (lambda: Diurnal(2.5), "peak: 2.5 is not between 1 and 2"),
        (lambda: Diurnal(1.5, 0.0), "period: 0 is not a number of seconds above 0"),
    ],
)
def test_arrivals_that_cannot_be_are_an_error(make: object, sentence: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=sentence):
        make()
