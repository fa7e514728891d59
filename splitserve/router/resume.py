"""What may go on with another decode worker, when its own was lost (resumed) or because it is to move (migrated). Pure.

The next worker gets the prompt and the tokens that the client has, and makes the ones after. Both ways share one
`SamplerState`, which follows from the sampling parameters and these tokens.

| feature | goes on | why |
|---|---|---|
| greedy (temperature 0) | exact | the next token is a function of the tokens before it |
| sampling without a seed | exact in distribution | each draw is independent of the draws before it |
| sampling with a seed | exact | one draw per output token: the generator is moved past those that were made |
| presence_penalty, frequency_penalty | exact | the sampler counts the output so far as output |
| repetition_penalty, top_p, top_k, min_p | exact | they look at prompt and output alike, or at one step |
| max_tokens, min_tokens, usage | exact | the worker is told the output so far, and counts it |
| stop strings, include_stop, text | exact | the worker replays the output so far through its detokeniser |
| tool calls, reasoning | exact | the worker replays the output so far through its parser; ids that were sent stay |
| structured_output | exact | the worker's grammar accepts the output so far before it constrains anything |
| stop_token_ids, ignore_eos, logit_bias, logprobs | exact | they look at one step |
| prompt_logprobs | exact | they come with the first token, and not again |
| LoRA adapter, cache salt | exact | each job of the request names them |

That holds where the engine takes up all of `STATEFUL`. vLLM with its model runner V2 takes up seeds (each of its draws
follows from seed and position) and structured output; vLLM with speculative decoding structured output alone. There
the draws of a resumed request are valid but not identical, its penalties are refused by the worker, by name, and
neither should be migrated.
"""

from collections.abc import Collection, Sequence

from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.sampler_state import STATEFUL, SamplerState


def finished_already(
    sampling: SamplingParams, output: Sequence[int], eos_token_ids: Sequence[int], called_tools: bool = False
) -> FinishReason | None:
    """How the output has ended if only the lost worker's word for it is missing. `sampling.max_tokens` is set;
    `called_tools`: the client has pieces of a call, and chose no function by name."""
    if not output:
        return None
    long_enough = len(output) >= sampling.min_tokens
    is_eos = output[-1] in eos_token_ids and not sampling.ignore_eos
    if long_enough and (is_eos or output[-1] in sampling.stop_token_ids):
        return FinishReason.TOOL_CALLS if called_tools else FinishReason.STOP
    assert sampling.max_tokens is not None
    return FinishReason.LENGTH if len(output) >= sampling.max_tokens else None


def migration_refusal(sampling: SamplingParams, output: Sequence[int], restores: Collection[str] = STATEFUL) -> str:
    """Why a running request must not move to an engine that takes up the state of these fields alone; "" if it may.
    What would go on valid but not identical is refused too: nothing forces it to move."""
    lost = SamplerState.of(sampling, output).lost_on(restores)
    if not lost:
        return ""
    names = ", ".join(f"sampling.{name}" for name in lost)
    return f"{names}: the other worker's engine can't take up its state after {len(output)} tokens; let it finish here"
