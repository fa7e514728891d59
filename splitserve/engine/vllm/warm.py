"""Runs every sampler path once before a worker is ready: first uses compile, and no user must wait for that."""

from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from splitserve.core.errors import ConfigError
from splitserve.core.request import SamplingParams, StructuredOutput
from splitserve.core.worker import DecodeJob, Delta, Failure, Outcome
from splitserve.engine.vllm.runner import START_TIMEOUT_S

LONG_PROMPT = 512  # tokens, as far as the model's length allows
TOKENS = 4

PATHS = (
    SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=2),
    SamplingParams(max_tokens=TOKENS, temperature=0.0, structured_output=StructuredOutput(choice=("yes", "no"))),
    SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logit_bias={1: 1.0}),
    SamplingParams(max_tokens=TOKENS, temperature=0.8, min_p=0.1, ignore_eos=True),
    SamplingParams(
        max_tokens=TOKENS, min_tokens=2, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1
    ),
    SamplingParams(max_tokens=TOKENS, temperature=0.8, top_p=0.9, top_k=8, seed=1, ignore_eos=True),
)


def warm_up(
    submit: Callable[[DecodeJob], None], ended: "SimpleQueue[Delta]", vocab_size: int, max_model_len: int
) -> None:
    """Runs the paths one after the other, the first on a long prompt and the last once more as if begun elsewhere; each
    one's last delta is awaited in `ended`. One that vLLM refuses (with speculative decoding some are) nobody can take.
    Raises ConfigError with vLLM's words if one can't run."""
    for job in _jobs(vocab_size, max_model_len):
        submit(job)
        outcome = _wait(ended).outcome
        if outcome is None or (outcome.failure is not None and not _refused(outcome)):
            said = outcome.message if outcome else "no outcome"
            raise ConfigError("engine", f"warming up {job.sampling} failed: {said}")


def _jobs(vocab_size: int, max_model_len: int) -> Iterator[DecodeJob]:
    for number, sampling in enumerate((*PATHS, PATHS[-1])):
        length = min(LONG_PROMPT if number == 0 else 2, max_model_len - TOKENS)
        prompt = tuple(token % vocab_size for token in range(1, length + 1))
        output = prompt[:1] if number == len(PATHS) else ()
        yield DecodeJob(f"warm-up-{number}", "warm-up", prompt, sampling, START_TIMEOUT_S, output)


def _refused(outcome: Outcome) -> bool:
    return outcome.failure is Failure.INVALID and outcome.field.startswith("sampling")


def _wait(ended: "SimpleQueue[Delta]") -> Delta:
    try:
        return ended.get(timeout=START_TIMEOUT_S)
    except Empty as error:
        raise ConfigError("engine", f"warming up did not end within {START_TIMEOUT_S:.0f} s") from error
