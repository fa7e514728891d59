"""What is drawn again, and what must not differ between runs of the same requests."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.bench.resampling import Span, block_length, drawn, interval


@given(count=st.integers(1, 300), resamples=st.integers(0, 30), seed=st.integers(0, 2**32))
def test_a_resample_has_as_many_requests_as_the_sample_which_comes_first(count: int, resamples: int, seed: int) -> None:
    counts = drawn([Span(0, 0, count)], resamples, seed)[0].counts
    assert counts.shape == (resamples + 1, count)
    assert (counts.sum(axis=1) == count).all()
    assert (counts[0] == 1).all()
    assert (counts >= 0).all()


def test_requests_are_drawn_with_their_neighbours() -> None:
    counts = drawn([Span(0, 0, 400)], 200, 1)[0].counts[1:]
    changes = (np.diff(counts, axis=1) != 0).sum(axis=1)
    assert block_length(400) == 40
    # Ten blocks begin and end; single requests drawn again would change count some 270 times.
    assert changes.max() <= 20


def test_every_request_is_drawn_as_often_as_every_other() -> None:
    counts = drawn([Span(0, 0, 50)], 20_000, 2)[0].counts[1:]
    assert counts.mean(axis=0) == pytest.approx(np.ones(50), abs=0.05)


def test_runs_of_one_seed_draw_the_same_requests_and_other_seeds_others() -> None:
    found = drawn([Span(3, 0, 100), Span(3, 0, 100), Span(4, 0, 100)], 10, 0)
    again = drawn([Span(3, 0, 100)], 10, 0)
    assert (found[3].counts == again[3].counts).all()
    assert (found[3].counts[1:] != found[4].counts[1:]).any()


def test_a_run_that_lacks_requests_takes_those_it_has() -> None:
    whole, late, short = Span(0, 0, 10), Span(0, 4, 6), Span(0, 0, 3)
    resamples = drawn([late, whole, short], 5, 0)[0]
    assert (resamples.of(late) == resamples.of(whole)[:, 4:]).all()
    assert (resamples.of(short) == resamples.of(whole)[:, :3]).all()


def test_an_interval_is_the_middle_of_the_resamples_and_holds_the_estimate() -> None:
    values = np.arange(1001, dtype=np.float64)
    assert interval(np.concatenate(([500.0], values))) == pytest.approx((25.0, 975.0))
    assert interval(np.concatenate(([2000.0], values))) == pytest.approx((25.0, 2000.0))
    assert interval(np.array([3.0])) == (3.0, 3.0)
