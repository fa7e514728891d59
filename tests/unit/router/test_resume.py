"""What may go on elsewhere."""

import pytest

from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.sampler_state import STATEFUL
from splitserve.router.resume import finished_already, migration_refusal


@pytest.mark.parametrize(
    ("sampling", "output", "reason"),
    [
        (SamplingParams(max_tokens=3), [5, 6], None),
        (SamplingParams(max_tokens=3), [5, 6, 7], FinishReason.LENGTH),
        (SamplingParams(max_tokens=3), [5, 1], FinishReason.STOP),
        (SamplingParams(max_tokens=3, ignore_eos=True), [5, 1], None),
        (SamplingParams(max_tokens=9, min_tokens=3), [5, 1], None),
        (SamplingParams(max_tokens=9, stop_token_ids=(7,)), [5, 7], FinishReason.STOP),
        (SamplingParams(max_tokens=9, stop_token_ids=(7,), ignore_eos=True), [5, 7], FinishReason.STOP),
        (SamplingParams(max_tokens=2), [], None),
    ],
)
def test_an_output_is_finished_when_its_last_token_says_so(
    sampling: SamplingParams, output: list[int], reason: FinishReason | None
) -> None:
    assert finished_already(sampling, output, eos_token_ids=(1,)) is reason


def test_an_output_that_called_a_tool_ends_as_its_calls() -> None:
    sampling = SamplingParams(max_tokens=3)
    assert finished_already(sampling, [5, 1], (1,), called_tools=True) is FinishReason.TOOL_CALLS
    assert finished_already(sampling, [5, 6, 7], (1,), called_tools=True) is FinishReason.LENGTH


@pytest.mark.parametrize("field", sorted(STATEFUL))
def test_a_request_does_not_move_where_its_sampler_state_would_be_lost(field: str) -> None:
    sampling = SamplingParams(max_tokens=9, **{field: 1})  # type: ignore[arg-type]
    assert migration_refusal(sampling, [5, 6], STATEFUL) == ""
    refusal = migration_refusal(sampling, [5, 6], STATEFUL - {field})
    assert f"sampling.{field}" in refusal
    assert "after 2 tokens" in refusal


def test_a_sampler_without_a_state_may_go_on_anywhere() -> None:
    stateless = SamplingParams(max_tokens=9, repetition_penalty=1.5, stop=("x",), logprobs=2, min_tokens=2)
    greedy = SamplingParams(max_tokens=9, temperature=0, seed=3)
    for sampling in (stateless, greedy):
        assert migration_refusal(sampling, [5], restores=()) == ""
    assert migration_refusal(SamplingParams(max_tokens=9, seed=3), [], restores=()) == "", "no draw was made yet"
