import numpy as np
import pytest

from splitserve.workload.lengths import empirical, lognormal
from splitserve.workload.requests import Requests
from splitserve.workload.statistics import quantiles, quantiles_of, summary


def test_quantiles_are_lengths_that_occurred() -> None:
    found = quantiles(np.arange(1, 101))
    assert (found.p10, found.p25, found.p50, found.p90, found.p99, found.longest) == (10, 25, 50, 90, 99, 100)
    assert found.mean == 50.5


def test_a_distributions_quantiles_are_those_of_its_sample() -> None:
    tokens = np.arange(1, 101)
    assert quantiles_of(empirical(tokens)) == pytest.approx(quantiles(tokens))


def test_the_longest_of_a_distribution_is_the_longest_that_is_ever_met() -> None:
    assert quantiles_of(lognormal(100, 0.3, high=100_000)).longest < 1000


def test_a_summary_has_rate_and_burstiness() -> None:
    requests = Requests(np.array([0.0, 1.0, 4.0]), np.array([5, 5, 5]), np.array([1, 1, 1]))
    found = summary(requests)
    assert found.rate_rps == pytest.approx(0.5)
    assert found.interarrival_cv == pytest.approx(0.5)
    assert (found.requests, found.prefix_hit) == (3, 0.0)


def test_requests_at_one_moment_have_no_rate() -> None:
    found = summary(Requests(np.zeros(3), np.array([5, 5, 5]), np.array([1, 1, 1])))
    assert (found.rate_rps, found.interarrival_cv) == (None, None)
    assert summary(Requests(np.zeros(1), np.array([5]), np.array([1]))).rate_rps is None
