"""Between our nouns and vLLM's: sampling parameters, detokeniser, log-probabilities. No state."""

from collections.abc import Sequence
from typing import Any

from splitserve.core.request import Logprob, SamplingParams
from splitserve.core.sampler_state import SamplerState
from splitserve.core.worker import DecodeJob
from splitserve.engine.vllm.sampler_state import extra_args


def vllm_params(
    sampling: SamplingParams, state: SamplerState, room: int, kv_transfer_params: dict[str, Any] | None
) -> Any:
    """vLLM's SamplingParams for what is left of a request in this state; `room` is what the model's length leaves. Stop
    strings and text stay with our detokeniser. Raises ValueError for what vLLM refuses."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    produced = state.output_tokens
    left = room if sampling.max_tokens is None else min(room, sampling.max_tokens - produced)
    transfer = {} if kv_transfer_params is None else {"kv_transfer_params": kv_transfer_params}
    return VllmSamplingParams(
        max_tokens=left,
        min_tokens=min(left, max(0, sampling.min_tokens - produced)),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=transfer | extra_args(state) or None,
    )


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it won't have."""
    from vllm.exceptions import VLLMValidationError

    return ValueError, VLLMValidationError


def vllm_prompt(tokens: list[int]) -> Any:
    from vllm.inputs.engine import tokens_input

    return tokens_input(tokens)


def tokenizer(path: str) -> Any:
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(path)


def detokenizer(vllm_tokenizer: Any, job: DecodeJob) -> Any:
    """vLLM's incremental detokeniser, primed with the prompt and with what the client already has."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    params = VllmSamplingParams(max_tokens=None, stop=list(job.sampling.stop), min_tokens=job.sampling.min_tokens)
    request = EngineCoreRequest(
        request_id=job.job_id,
        prompt_token_ids=list(job.prompt),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    made = IncrementalDetokenizer.from_new_request(vllm_tokenizer, request)
    for token in job.output:
        made.update([token], False)
        made.get_next_output_text(False, delta=True)
    return made


def logprobs_of(positions: Sequence[dict[int, Any]] | None) -> tuple[tuple[Logprob, ...], ...]:
    """vLLM gives per position a dict with the sampled token first, then the likeliest."""
    return tuple(
        tuple(Logprob(token, entry.logprob, entry.rank or 0) for token, entry in position.items())
        for position in positions or ()
    )
