"""What may go on elsewhere once a decode worker is lost in mid-stream. Pure.

The next worker gets the prompt and the tokens that the client has, and makes the ones after.

| feature | resumed | why |
|---|---|---|
| greedy (temperature 0) | exact | the next token is a function of the tokens before it |
| sampling without a seed | exact in distribution | each draw is independent of the draws before it |
| sampling with a seed | valid, not identical | the generator starts anew; the draws already made are not replayed |
| repetition_penalty | exact | it looks at prompt and output alike |
| presence_penalty, frequency_penalty | refused | they count output tokens only; the output so far is now prompt |
| max_tokens, min_tokens | exact | the worker is told the output so far, and counts it |
| stop strings, text | exact | the worker replays the output so far through its detokeniser |
| stop_token_ids, ignore_eos, logprobs | exact | they look at one step |
"""

from collections.abc import Sequence

from splitserve.core.errors import SplitserveError, Unavailable
from splitserve.core.request import FinishReason, SamplingParams

_COUNT_OUTPUT_ONLY = ("presence_penalty", "frequency_penalty")


def finished_already(
    sampling: SamplingParams, output: Sequence[int], eos_token_ids: Sequence[int]
) -> FinishReason | None:
    """How the output has ended if only the lost worker's word for it is missing. `sampling.max_tokens` is set."""
    if not output:
        return None
    long_enough = len(output) >= sampling.min_tokens
    is_eos = output[-1] in eos_token_ids and not sampling.ignore_eos
    if long_enough and (is_eos or output[-1] in sampling.stop_token_ids):
        return FinishReason.STOP
    assert sampling.max_tokens is not None
    return FinishReason.LENGTH if len(output) >= sampling.max_tokens else None


def check_resumable(sampling: SamplingParams, output: Sequence[int], cause: SplitserveError) -> None:
    """Raises Unavailable naming the field that stands in the way."""
    for name in _COUNT_OUTPUT_ONLY:
        if output and getattr(sampling, name) != 0:
            raise Unavailable(
                f"sampling.{name}: a request with it can't be resumed after {len(output)} tokens ({cause}); "
                "send it again from the start"
            ) from cause
