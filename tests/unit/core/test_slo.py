"""Timelines, objectives and attainment."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.slo import Slo, Timeline, attainment

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
