"""What one colocated engine says: vLLM by itself, without a connector of ours, in a process of its own."""

import multiprocessing as mp
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

ANSWER_TIMEOUT_S = 240

Tops = tuple[tuple[int, float, int], ...]  # token, log-probability, rank; the token that is there first


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt. `sampling` in vLLM's names; `lora` is an adapter's directory, empty: none."""

    prompt: tuple[int, ...]
    sampling: Mapping[str, Any]
    lora: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """One of a prompt's outputs; the prompt's log-probabilities are the same in each."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[Tops, ...]
    prompt_logprobs: tuple[Tops, ...]


def _serve(pipe: Connection, model: str, max_model_len: int, core: int, extra: Mapping[str, Any]) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    import torch

    from vllm import LLM, SamplingParams

    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=2**29,
        enable_prefix_caching=False,
        **extra,
    )
    while (question := pipe.recv()) is not None:
        if isinstance(question, Question):
            pipe.send(_outputs(llm, question))
            continue
        prompts, sampling = question
        params = SamplingParams(**sampling, ignore_eos=True, detokenize=False)
        answers = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
        outputs = [answer.outputs[0] for answer in answers]
        if "logprobs" in sampling:
            pipe.send([[(t, e.logprob) for t, e in position.items()] for o in outputs for position in o.logprobs])
        else:
            pipe.send([list(output.token_ids) for output in outputs])


def _outputs(llm: Any, question: Question) -> list[Output]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    said = dict(question.sampling)
    if "structured_outputs" in said:
        said["structured_outputs"] = StructuredOutputsParams(**said["structured_outputs"])
    lora = LoRARequest(question.lora, 1, question.lora) if question.lora else None
    prompt = {"prompt_token_ids": list(question.prompt)}
    (answer,) = llm.generate([prompt], SamplingParams(**said), use_tqdm=False, lora_request=lora)
    of_prompt = _tops(answer.prompt_logprobs)
    return [
        Output(tuple(one.token_ids), one.text, one.finish_reason, _tops(one.logprobs), of_prompt)
        for one in answer.outputs
    ]


def _tops(positions: Any) -> tuple[Tops, ...]:
    return tuple(tuple((t, e.logprob, e.rank) for t, e in (position or {}).items()) for position in positions or ())


class Oracle:
    """Continuations by plain vLLM."""

    def __init__(
        self, model: Path, max_model_len: int, core: int, extra: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        context = mp.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, str(model), max_model_len, core, dict(extra)), daemon=True
        )
        self._process.start()

    def continue_each(self, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: float) -> list[list[int]]:
        """Greedy unless `sampling`, in vLLM's names, says otherwise."""
        self._pipe.send((prompts, {"temperature": 0, "max_tokens": max_tokens, **sampling}))
        assert self._pipe.poll(ANSWER_TIMEOUT_S), "the oracle does not answer"
        answers: list[list[int]] = self._pipe.recv()
        return answers

    def outputs(self, prompt: Sequence[int], lora: str = "", **sampling: Any) -> list[Output]:
        """All that vLLM says of one prompt; `sampling` in vLLM's names, vLLM's defaults unless said."""
        self._pipe.send(Question(tuple(prompt), sampling, lora))
        assert self._pipe.poll(ANSWER_TIMEOUT_S), "the oracle does not answer"
        answers: list[Output] = self._pipe.recv()
        return answers

    def next_two(self, tokens: Sequence[int]) -> list[tuple[int, float]]:
        """The two likeliest tokens after these, the best first, with their log-probabilities."""
        self._pipe.send(([tokens], {"temperature": 0, "max_tokens": 1, "logprobs": 2}))
        assert self._pipe.poll(ANSWER_TIMEOUT_S), "the oracle does not answer"
        likeliest: list[tuple[int, float]] = self._pipe.recv()[0]
        return sorted(likeliest, key=lambda entry: -entry[1])[:2]

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(30)
