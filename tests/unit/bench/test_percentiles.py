"""Percentiles of two systems, by hand and with intervals that mean something."""

import math

import numpy as np
import pytest

from splitserve.bench.percentiles import Part, Quotient, quotients
from splitserve.bench.run import Chunks, Ending, Run


def run(ttft_s: list[float], gap_s: float = 0.1, tokens: int = 3) -> Run:
    """Each request has its tokens one by one after its TTFT, and one without a TTFT fails."""
    count = len(ttft_s)
    due, first = np.arange(count, dtype=np.float64), np.arange(count) + np.array(ttft_s)
    came = np.isfinite(first)
    chunks = sorted((float(first[row]) + gap_s * n, row) for row in np.flatnonzero(came) for n in range(tokens))
    counts = np.where(came, tokens, 0)
    return Run(
        scheduled_s=due,
        sent_s=due,
        first_token_s=first,
        last_token_s=first + gap_s * (tokens - 1),
        ended_s=due + 9.0,
        prompt_tokens=counts,
        tokens=counts,
        asked_tokens=np.full(count, tokens),
        ending=np.where(came, Ending.DONE, Ending.FAILED).astype(np.int8),
        error=np.full(count, -1, dtype=np.int32),
        errors=(),
        chunks=Chunks(
            np.array([time for time, _ in chunks]),
            np.array([row for _, row in chunks], dtype=np.int64),
            np.ones(len(chunks), dtype=np.int64),
        ),
    )


def found(a: list[Part], b: list[Part], resamples: int = 500) -> dict[tuple[str, float], Quotient]:
    return {(one.what, one.quantile): one for one in quotients(a, b, resamples)}


def test_a_percentile_is_the_value_that_so_many_are_no_longer_than() -> None:
    a, b = run([0.1, 0.2, 0.3, 0.4], gap_s=0.1), run([0.2, 0.2, 0.2, 1.0], gap_s=0.05)
    said = found([Part(0, 0, a)], [Part(0, 0, b)])
    ttft = said["TTFT", 0.5]
    assert (ttft.a_s, ttft.b_s, ttft.value) == pytest.approx((0.2, 0.2, 1.0))
    assert said["TTFT", 0.99].value == pytest.approx(0.4)
    assert said["TPOT", 0.5].value == pytest.approx(2.0)
    assert said["ITL", 0.99].value == pytest.approx(2.0)


def test_the_interval_of_a_constant_factor_has_no_width() -> None:
    ttft_s = np.random.default_rng(0).exponential(1.0, 200)
    a, b = run((2 * ttft_s).tolist()), run(ttft_s.tolist())
    said = found([Part(0, 0, a)], [Part(0, 0, b)])["TTFT", 0.5]
    assert (said.value, said.low, said.high) == pytest.approx((2.0, 2.0, 2.0))
    apart = found([Part(0, 0, a)], [Part(1, 0, b)])["TTFT", 0.5]
    assert apart.low < 1.8
    assert apart.high > 2.2


def test_runs_of_several_seeds_are_one_and_a_warm_up_keeps_requests_in_step() -> None:
    ttft_s = np.random.default_rng(1).exponential(1.0, (2, 100))
    a = [Part(seed, 10, run((3 * ttft_s[seed, 10:]).tolist())) for seed in (0, 1)]
    b = [Part(seed, 10, run(ttft_s[seed, 10:].tolist())) for seed in (0, 1)]
    said = found(a, b)["TTFT", 0.99]
    assert (said.value, said.low, said.high) == pytest.approx((3.0, 3.0, 3.0))
    assert said.b_s == pytest.approx(np.quantile(ttft_s[:, 10:], 0.99, method="inverted_cdf"))


def test_each_seed_keeps_its_share_of_a_resample() -> None:
    slower_half = [Part(0, 0, run([0.1] * 100)), Part(1, 0, run([0.2] * 101))]
    said = found(slower_half, [Part(0, 0, run([0.1] * 100))])["TTFT", 0.5]
    assert (said.value, said.low, said.high) == pytest.approx((2.0, 2.0, 2.0))


def test_what_never_came_is_infinite_and_not_left_out() -> None:
    fine, failing = run([0.1] * 10), run([0.1] * 9 + [math.inf])
    dead = run([math.inf] * 10)
    late = found([Part(0, 0, failing)], [Part(0, 0, fine)])
    assert late["TTFT", 0.5].value == 1.0
    assert (late["TTFT", 0.99].value, late["TTFT", 0.99].low, late["TTFT", 0.99].high) == (math.inf, 1.0, math.inf)
    assert found([Part(0, 0, fine)], [Part(0, 0, dead)])["TTFT", 0.5].value == 0.0
    neither = found([Part(0, 0, dead)], [Part(0, 0, dead)])
    assert math.isnan(neither["TTFT", 0.5].value)
    assert math.isnan(neither["TTFT", 0.5].high)
    assert ("ITL", 0.5) not in neither


def test_long_outputs_are_resampled_less_often_and_alike() -> None:
    rng = np.random.default_rng(2)
    a, b = (run(rng.exponential(1.0, 150).tolist(), tokens=300) for _ in range(2))
    said = found([Part(0, 0, a)], [Part(0, 0, b)])["ITL", 0.5]
    assert said.value == pytest.approx(1.0)
    assert said.low <= said.value <= said.high
