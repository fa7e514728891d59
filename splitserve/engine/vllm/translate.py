"""Between our nouns and vLLM's: environment, sampling parameters, detokeniser, log-probabilities. No state."""

import os
import socket
from collections.abc import Sequence
from typing import Any

from splitserve.core.request import Logprob, SamplingParams
from splitserve.core.sampler_state import SamplerState
from splitserve.core.worker import DecodeJob, KvFormat, KvPeer
from splitserve.engine.vllm.sampler_state import extra_args
from splitserve.kv.control import is_loopback
from splitserve.kv.layout import part_of


def prepare_environment(host: str) -> None:
    """Settings that vLLM reads from the environment when it is imported. What the user has set stays."""
    defaults = {
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the CPU platform takes the multi-process executor
        "VLLM_HOST_IP": host,
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if is_loopback(host):
        defaults["UCX_NET_DEVICES"] = "lo"  # else UCX listens on every interface
    if _torch_is_for_cpu():
        defaults["TORCHDYNAMO_DISABLE"] = "1"  # else the first logprobs call compiles C++ for 50 s
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "VLLM_NIXL_SIDE_CHANNEL_PORT" not in os.environ:
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_free_port(host))


def side_channel_peer(uuid: str, kv: KvFormat) -> KvPeer:
    """Pull mode: where the stock connector listens."""
    host, port = os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"], os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]
    return KvPeer(uuid, f"tcp://{host}:{port}", part_of(0, 1, kv.kv_heads, 0, kv.layers))


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

    params = VllmSamplingParams(stop=list(job.sampling.stop), min_tokens=job.sampling.min_tokens)
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


def _torch_is_for_cpu() -> bool:
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
