"""What may go on elsewhere."""

import pytest

from splitserve.core.errors import Unavailable
from splitserve.core.request import FinishReason, SamplingParams
from splitserve.router.resume import check_resumable, finished_already

CAUSE = Unavailable("d0 is gone")


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


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
def test_penalties_that_count_output_can_not_be_resumed(field: str) -> None:
    sampling = SamplingParams(max_tokens=9, **{field: 0.1})  # type: ignore[arg-type]
    check_resumable(sampling, [], CAUSE)
    with pytest.raises(Unavailable, match=rf"sampling\.{field}.*d0 is gone"):
        check_resumable(sampling, [5], CAUSE)


def test_everything_else_can() -> None:
    sampling = SamplingParams(max_tokens=9, repetition_penalty=1.5, seed=3, stop=("x",), logprobs=2, min_tokens=2)
    check_resumable(sampling, [5], CAUSE)
