"""Timelines, objectives and attainment."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.slo import Slo, Timeline, Timelines, attainment, rank_of_p99

times = st.lists(st.floats(0, 1e6), min_size=1, max_size=20).map(sorted)


def test_ttft_counts_from_arrival_and_tpot_only_between_tokens() -> None:
    timeline = Timeline(10.0, (12.0, 12.5, 14.0))
    assert (timeline.ttft_s, timeline.tpot_s, timeline.itl_s) == (2.0, 1.0, (0.5, 1.5))


def test_a_request_without_a_token_never_had_its_first() -> None:
    assert Timeline(0.0, ()).ttft_s == math.inf


def test_a_single_token_has_no_time_between_tokens() -> None:
    assert (Timeline(0.0, (1.0,)).tpot_s, Timeline(0.0, (1.0,)).itl_s) == (0.0, ())


@given(times)
def test_tpot_is_the_mean_gap(tokens: list[float]) -> None:
    timeline = Timeline(0.0, tuple(tokens))
    mean = sum(timeline.itl_s) / max(1, len(tokens) - 1)
    assert timeline.tpot_s == pytest.approx(mean, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("timeline", "met"),
    [
        (Timeline(0.0, (1.0, 1.1)), True),
        (Timeline(0.0, (1.01, 1.1)), False),
        (Timeline(0.0, (0.5, 0.7)), False),
        (Timeline(0.0, (0.5, 0.55), finished=False), False),
        (Timeline(0.0, ()), False),
    ],
)
def test_both_objectives_are_met_or_neither_counts(timeline: Timeline, met: bool) -> None:
    assert Slo(ttft_s=1.0, tpot_s=0.11).met_by(timeline) is met


def test_attainment_is_the_share_of_requests_that_meet_both() -> None:
    good, late = Timeline(0.0, (0.5,)), Timeline(0.0, (5.0,))
    assert attainment([good, late, late, good], Slo(1.0, 1.0)) == 0.5


def test_attainment_of_nothing_is_whole() -> None:
    assert attainment([], Slo(1.0, 1.0)) == 1.0


def test_a_prompt_may_take_longer_the_longer_it_is() -> None:
    slo = Slo(ttft_s=0.1, tpot_s=1.0, ttft_per_token_s=0.001)
    lines = Timelines(
        np.zeros(3), np.array([0.5, 0.5, 0.6]), np.ones(3), np.full(3, 5), prompt_tokens=np.array([399, 400, 500])
    )
    assert lines.met(slo).tolist() == [False, True, True]
    assert [slo.met_by(Timeline(0.0, (0.5,), prompt_tokens=tokens)) for tokens in (399, 400)] == [False, True]


@pytest.mark.parametrize(("gaps", "rank"), [(1, 1), (99, 99), (100, 99), (101, 100), (200, 198), (201, 199)])
def test_the_99th_percentile_is_the_smallest_gap_that_99_of_100_are_no_longer_than(gaps: int, rank: int) -> None:
    assert rank_of_p99(gaps) == rank
    times = np.concatenate(([0.0], np.cumsum(np.arange(1, gaps + 1))))
    assert Timeline(0.0, tuple(times)).itl_p99_s == rank


def test_a_pause_in_mid_stream_fails_the_objective_for_gaps_but_not_the_mean() -> None:
    pausing = Timeline(0.0, (0.0, 0.1, 0.2, 0.9, 1.0))
    assert Slo(1.0, 0.3).met_by(pausing)
    assert not Slo(1.0, 0.3, itl_p99_s=0.5).met_by(pausing)


@pytest.mark.parametrize("slo", [Slo(1.0, 1.0, itl_p99_s=0.5), Slo(1.0, 1.0, ttft_per_token_s=0.5)])
def test_an_objective_that_needs_what_is_not_known_is_refused(slo: Slo) -> None:
    lines = Timelines(np.zeros(1), np.ones(1), np.ones(1), np.ones(1, dtype=np.int64))
    with pytest.raises(ValueError, match="can't be judged"):
        lines.met(slo)
