"""Between our nouns and vLLM's: sampling parameters, detokeniser, log-probabilities. No state."""

from collections.abc import Mapping, Sequence
from typing import Any

from splitserve.core.request import Logprob, SamplingParams, StructuredOutput
from splitserve.core.sampler_state import SamplerState
from splitserve.core.worker import DecodeJob
from splitserve.engine.vllm.sampler_state import extra_args

STRUCTURED_OUTPUT = "sampling.structured_output"
NAMED = ("logit_bias", "min_p", "prompt_logprobs", "logprobs", "stop_token_ids", "temperature", "top_p", "top_k")


def vllm_params(
    sampling: SamplingParams,
    state: SamplerState,
    room: int,
    extra: dict[str, Any],
    structured_outputs: Any = None,
) -> Any:
    """vLLM's SamplingParams for what is left of a request in this state; `room` is what the model's length leaves. Stop
    strings and text stay with our detokeniser. Raises ValueError for what vLLM refuses."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    produced = state.output_tokens
    left = room if sampling.max_tokens is None else min(room, sampling.max_tokens - produced)
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
        prompt_logprobs=None if produced else sampling.prompt_logprobs,
        logit_bias=dict(sampling.logit_bias) or None,
        structured_outputs=structured_outputs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra | extra_args(state) or None,
    )


def structured_params(said: StructuredOutput) -> Any:
    """Raises ValueError unless one kind is said."""
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(
        json=said.json_schema or None,
        json_object=said.json_object or None,
        regex=said.regex or None,
        choice=list(said.choice) or None,
        grammar=said.grammar or None,
    )


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it won't have."""
    from vllm.exceptions import VLLMValidationError

    return ValueError, VLLMValidationError


def field_of(error: Exception, params: Any, vllm_config: Any, tokenizer: Any) -> str:
    """Which of a request's fields vLLM means. It names parameters now and then, some in its sentence only, and never
    the structured output."""
    said = f"{getattr(error, 'parameter', None)} {error}"
    named = [name for name in NAMED if name in said and getattr(params, name)]
    if named:
        return f"sampling.{named[0]}"
    if params.structured_outputs is None:
        return "prompt"
    try:
        type(params)(structured_outputs=params.structured_outputs).verify(
            vllm_config.model_config, None, vllm_config.structured_outputs_config, tokenizer
        )
    except refusals():
        return STRUCTURED_OUTPUT
    return "prompt"


def lora_requests(loras: Mapping[str, str]) -> dict[str, Any]:
    """vLLM's LoRARequest of each adapter, by name."""
    from vllm.lora.request import LoRARequest

    return {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(loras.items(), start=1)}


def tokenizer(path: str) -> Any:
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(path)


def detokenizer(vllm_tokenizer: Any, job: DecodeJob, skip_special_tokens: bool) -> Any:
    """vLLM's incremental detokeniser, primed with the prompt."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    params = VllmSamplingParams(
        max_tokens=None,
        stop=list(job.sampling.stop),
        min_tokens=job.sampling.min_tokens,
        include_stop_str_in_output=job.sampling.include_stop,
        skip_special_tokens=skip_special_tokens,
    )
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
    return IncrementalDetokenizer.from_new_request(vllm_tokenizer, request)


def logprobs_of(positions: Sequence[dict[int, Any] | None] | None) -> tuple[tuple[Logprob, ...], ...]:
    """vLLM gives per position a dict with the token itself first, then the likeliest; none for a prompt's first."""
    return tuple(
        tuple(Logprob(token, entry.logprob, entry.rank or 0) for token, entry in (position or {}).items())
        for position in positions or ()
    )
