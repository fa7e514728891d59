"""What decodes leave of a step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import Step, pairs
from splitserve.routing.lengths import OutputLengths
from splitserve.routing.slack import LEAST_CHUNK, TOKENS_IN_HAND, chunk_within, is_urgent, slack_of

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
    assert slack_of(0.15, TEN, 0.02, 0.01, NONE_ENDED, 0.1) == pytest.approx(0.05)


def test_a_decode_that_is_late_has_less_than_none() -> None:
    assert slack_of(0.25, TEN, 0.02, 0.03, NONE_ENDED, 0.1) == pytest.approx(-0.05)


def test_what_its_remaining_steps_will_save_counts() -> None:
    """Ninety more tokens of 10 ms, with 20 ms for each."""
    assert slack_of(0.15, TEN, 0.02, 0.01, all_of(TEN + 90), 0.1) == pytest.approx(0.05 + 90 * 0.01)


def test_steps_longer_than_the_objective_save_nothing() -> None:
    assert slack_of(0.15, TEN, 0.02, 0.03, all_of(100), 0.1) == pytest.approx(0.05)


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
