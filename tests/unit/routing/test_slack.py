"""What decodes leave of a step."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.worker import StepCost
from splitserve.latency.cost import latency_of
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import Step, pairs
from splitserve.routing.lengths import OutputLengths
from splitserve.routing.slack import (
    LEAST_CHUNK,
    TIMES_THE_START,
    TOKENS_IN_HAND,
    chunk_within,
    is_urgent,
    least_chunk,
    slack_of,
)

LATENCY = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.0005, prefill_pair_s=1e-9)
NONE_ENDED = OutputLengths()
TEN = 10 + TOKENS_IN_HAND  # tokens, of which ten are not kept in hand


def all_of(tokens: int) -> OutputLengths:
    lengths = OutputLengths()
    for _ in range(100):
        lengths.add(tokens)
    return lengths


def test_slack_is_what_is_left_until_the_next_token_is_due_less_a_few_tokens() -> None:
    """Ten tokens at 20 ms each; they took 150 ms."""
    assert slack_of(0.15, TEN, 0.02, 0.01, all_of(TEN), 0.1, 0) == pytest.approx(0.05)


def test_a_decode_that_is_late_has_less_than_none() -> None:
    assert slack_of(0.25, TEN, 0.02, 0.03, NONE_ENDED, 0.1, 0) == pytest.approx(-0.05)


def test_what_its_remaining_steps_will_save_counts() -> None:
    """Ninety more tokens of 10 ms, with 20 ms for each."""
    assert slack_of(0.15, TEN, 0.02, 0.01, all_of(TEN + 90), 0.1, 0) == pytest.approx(0.05 + 90 * 0.01)


def test_until_outputs_have_ended_it_counts_what_is_expected_of_them() -> None:
    expected = NONE_ENDED.to_come(2, 0.1, 1000)
    assert slack_of(0.0, 2, 0.02, 0.01, NONE_ENDED, 0.1, 1000) == pytest.approx(
        (2 - TOKENS_IN_HAND) * 0.02 + expected * 0.01
    )


def test_steps_longer_than_the_objective_save_nothing() -> None:
    assert slack_of(0.15, TEN, 0.02, 0.03, all_of(100), 0.1, 0) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("left_s", "urgent"), [(0.19, False), (0.2, True), (0.3, True), (0.32, False), (2.0, False), (-1.0, False)]
)
def test_a_prompt_is_urgent_while_it_is_in_time_only_at_full_speed(left_s: float, urgent: bool) -> None:
    assert is_urgent(left_s, alone_s=0.2, tpot_s=0.01) is urgent


@given(
    slack_s=st.floats(-1.0, 1.0),
    decodes=st.integers(0, 100),
    context=st.integers(0, 100_000),
    done=st.integers(0, 4096),
    most=st.integers(0, 8192),
)
def test_a_chunk_fits_the_time_and_is_nearly_the_largest_that_does(
    slack_s: float, decodes: int, context: int, done: int, most: int
) -> None:
    def step_s(tokens: int) -> float:
        return LATENCY.step_s(Step(tokens, pairs(tokens, done), 1, decodes, context))

    chunk = chunk_within(LATENCY, slack_s, decodes, context, done, most)
    assert 0 <= chunk <= most
    if chunk:
        assert chunk >= min(LEAST_CHUNK, most)
        assert step_s(chunk) <= slack_s
    if chunk < most:
        assert step_s(max(min(LEAST_CHUNK, most), chunk + chunk // 16 + 1)) > slack_s


def test_where_every_chunk_costs_something_the_least_is_so_large_that_its_tokens_cost_more() -> None:
    """6.6 ms for each chunk, and 0.3 ms for each token of it."""
    cost = StepCost(0.008, 0.0066, 0.0003, inf, 0.0, 0.0, 0.0, 0.001, inf, 0.0, 0.0, 1)
    found = least_chunk(latency_of(cost))
    assert found * 0.0003 == pytest.approx(TIMES_THE_START * 0.0066, rel=0.01)
    assert chunk_within(latency_of(cost), 0.04, 4, 1000, 0, 512, found) == 0
    assert chunk_within(latency_of(cost), 0.07, 4, 1000, 0, 512, found) >= found


def test_where_chunks_cost_nothing_but_their_tokens_they_may_be_small() -> None:
    assert least_chunk(LATENCY) == LEAST_CHUNK
