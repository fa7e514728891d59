import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.workload.drift import (
    Histogram,
    Tolerance,
    Traffic,
    counts_of,
    cumulative,
    drift,
    shift,
    shift_between,
)
from splitserve.workload.lengths import Tokens
from splitserve.workload.named import workload
from splitserve.workload.statistics import quantiles, summary
from splitserve.workload.workload import Quantiles

BOUNDS = [float(2**power) for power in range(15)] + [math.inf]
PLAN = workload("sharegpt").describe()


def histogram(tokens: Tokens, bounds: list[float] = BOUNDS) -> Histogram:
    return counts_of(bounds, [float((tokens <= bound).sum()) for bound in bounds])


def traffic(name: str, rate_rps: float = 10.0, requests: int = 5000) -> Traffic:
    drawn = workload(name).draw(requests, rate_rps, 3)
    return Traffic(rate_rps, histogram(drawn.prompt_tokens), histogram(drawn.output_tokens))


def test_traffic_as_planned_has_not_drifted() -> None:
    found = drift(PLAN, 10.0, traffic("sharegpt"))
    assert not found.drifted
    assert found.prompt is not None
    assert found.prompt.ks < 0.05
    assert found.prompt.psi < 0.02


def test_other_lengths_have_drifted_and_the_sentence_says_where() -> None:
    found = drift(PLAN, 10.0, traffic("azure-code"))
    assert found.drifted
    assert found.output is not None
    assert found.output.psi > 0.25
    assert any("of outputs have at most 32 tokens, planned were" in reason for reason in found.reasons)
    assert not any("requests/s" in reason for reason in found.reasons)


@pytest.mark.parametrize("rate_rps", [8.0, 12.0])
def test_a_rate_beyond_its_tolerance_has_drifted_either_way(rate_rps: float) -> None:
    found = drift(PLAN, 10.0, traffic("sharegpt", rate_rps))
    assert found.rate_ratio == pytest.approx(rate_rps / 10)
    assert found.reasons == (f"{rate_rps:.3g} requests/s, {rate_rps / 10:.2f} times the planned 10",)
    assert not drift(PLAN, 10.0, traffic("sharegpt", rate_rps), Tolerance(rate=0.25)).drifted


def test_few_requests_say_nothing_of_lengths() -> None:
    found = drift(PLAN, 10.0, traffic("azure-code", requests=50))
    assert (found.prompt, found.output, found.reasons) == (None, None, ())


def test_what_a_small_sample_does_by_chance_is_no_drift() -> None:
    few = traffic("sharegpt", requests=210)
    found = drift(PLAN, 10.0, few, Tolerance(ks=0.0, psi=1.0))
    assert found.prompt is not None
    assert 0.0 < found.prompt.ks < found.prompt.noise
    assert not found.drifted


def test_quantiles_are_points_of_the_cumulative_share() -> None:
    q = PLAN.prompt
    at = np.array([0.1, q.p10, q.p25, q.p50, q.p90, q.p99, q.longest, 1e9])
    assert cumulative(q, at) == pytest.approx([0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0, 1.0])


def test_one_length_for_all_is_a_step() -> None:
    same = Quantiles(512, *(512.0,) * 7)
    assert cumulative(same, np.array([511.0, 512.0, 513.0])) == pytest.approx([0.0, 1.0, 1.0], abs=1e-9)
    assert shift(same, Histogram((256.0, 512.0, math.inf), (0.0, 100.0, 0.0))).ks == 0.0
    assert shift(same, Histogram((256.0, 512.0, math.inf), (100.0, 0.0, 0.0))).ks == 1.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(1.0, 6.0))
def test_a_shift_between_quantiles_is_nothing_for_the_same_and_grows_with_the_factor(seed: int, factor: float) -> None:
    tokens = np.random.default_rng(seed).lognormal(5.0, 1.0, 2000).astype(np.int64) + 1
    planned = quantiles(tokens)
    assert shift_between(planned, planned, 2000).ks == 0.0
    assert shift_between(planned, planned, 2000).psi == 0.0
    nearer = shift_between(planned, quantiles((tokens * factor).astype(np.int64) + 1), 2000)
    farther = shift_between(planned, quantiles((tokens * factor * 3).astype(np.int64) + 1), 2000)
    assert 0.0 <= nearer.ks <= farther.ks + 0.02 <= 1.02
    assert farther.ks > 0.2


def test_the_distance_is_that_of_the_samples_where_buckets_are_fine() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (np.exp(rng.normal(mean, 0.5, 50_000)).astype(np.int64) + 1 for mean in (6.0, 6.5))
    exact = max(abs(float((ours <= at).mean() - (theirs <= at).mean())) for at in range(1, 3000, 5))
    plan = quantiles(ours)
    assert shift(plan, histogram(theirs, [*np.arange(20.0, 6000.0, 20.0).tolist(), math.inf])).ks == pytest.approx(
        exact, abs=0.03
    )


def test_stability_index_is_the_textbooks() -> None:
    planned = Quantiles(0, p10=10, p25=25, p50=50, p75=75, p90=90, p99=99, longest=100)
    live = Histogram((50.0, 100.0), (80.0, 20.0))
    expected = (0.8 - 0.5) * math.log(0.8 / 0.5) + (0.2 - 0.5) * math.log(0.2 / 0.5)
    assert shift(planned, live).psi == pytest.approx(expected)
    assert shift(planned, live).ks == pytest.approx(0.3)
    assert shift(planned, live).at_tokens == 50.0


def test_prometheus_buckets_become_counts_of_their_own() -> None:
    assert counts_of([1.0, 2.0, math.inf], [3.0, 3.0, 10.0]) == Histogram((1.0, 2.0, math.inf), (3.0, 0.0, 7.0))


def test_a_counter_that_was_reset_between_buckets_is_no_negative_count() -> None:
    assert counts_of([1.0, 2.0], [3.0, 2.0]).counts == (3.0, 0.0)


def test_lengths_beyond_the_last_bound_still_count() -> None:
    drawn = workload("azure-conv").draw(5000, 1.0, 0)
    plan = summary(drawn)
    assert shift(plan.prompt, histogram(drawn.prompt_tokens, [256.0, 1024.0, math.inf])).ks < 0.05
