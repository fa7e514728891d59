"""Brings vLLM's sampler into the state of a request that was begun elsewhere. Runs in vLLM's worker processes.

Such a request has prompt and output so far as its prompt; its parameters say how many tokens of that are output. Two
things would go wrong. A seeded request's generator would start anew: it is moved past the draws that were made, one per
output token. And penalties would not count those tokens: the sampler is told of them as the output that they are, so
that vLLM's own code computes the same sums in the same order.

vLLM also draws for requests whose prompt is not read to its end in a step, drops the token, and rewinds the generator
by a constant. With a CPU generator that raises and ends the engine; on a GPU it may not be what was drawn. Here the
generators of such requests are out of the batch while it samples, so that each draw belongs to a token.

All on vLLM's step thread. For vLLM's model runner V1. V2 derives each draw from seed and position, so that seeds need
nothing; penalties of requests begun elsewhere are refused there, and with speculative decoding. Grammars live beside
vLLM's scheduler: `kv/connector/grammar.py`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from splitserve.core.sampler_state import GRAMMAR, OUTPUT_PENALTIES, STATEFUL, SamplerState
from splitserve.engine.vllm.versions import keep_seeds

CPU_WORKER = "splitserve.engine.vllm.on_cpu.CpuWorker"
GPU_WORKER = "splitserve.engine.vllm.on_gpu.GpuWorker"
WORKER_CLASSES = (CPU_WORKER, GPU_WORKER)  # they have SamplerStates

_OUTPUT_TOKENS = "splitserve_output_tokens"  # in SamplingParams.extra_args: how many, at the prompt's end, are output
_CPU_SEEDS = 2**31  # vLLM's CPU sampler draws one integer below this per token

Draw = Callable[[Any], object]  # makes one draw with a torch.Generator


def restorable(vllm_config: Any) -> frozenset[str]:
    """The fields of STATEFUL that an engine of this configuration can take up."""
    if vllm_config.speculative_config is not None:
        return frozenset({GRAMMAR})
    if vllm_config.use_v2_model_runner:
        return frozenset({GRAMMAR, "seed"})
    return STATEFUL if vllm_config.parallel_config.worker_cls in WORKER_CLASSES else frozenset({GRAMMAR})


def refuse_lost_penalties(state: SamplerState, restores: Collection[str]) -> None:
    """Raises ValueError naming a penalty that would count anew. Draws may: they stay valid, if not the same."""
    for name in set(state.lost_on(restores)).intersection(OUTPUT_PENALTIES):
        raise ValueError(
            f"{name}: this worker's vLLM can't take it up after {state.output_tokens} tokens (model runner V2, "
            "speculative decoding or a worker_cls of its own); send the request again from the start"
        )


def extra_args(state: SamplerState) -> dict[str, int]:
    """For vLLM's SamplingParams, from where `SamplerStates` reads it."""
    return {_OUTPUT_TOKENS: state.output_tokens} if state.fields else {}


class SamplerStates:
    """To be mixed into a vLLM worker class, before vLLM's own."""

    model_runner: Any
    model_config: Any
    device: Any
    use_v2_model_runner: bool

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        if not self.use_v2_model_runner:
            keep_seeds(self.model_runner.sampler.topk_topp_sampler)
        if not self.use_v2_model_runner and self.model_runner.speculative_config is None:
            self.model_runner.sampler.register_forward_pre_hook(self._count_earlier_output, with_kwargs=True)

    def execute_model(self, scheduler_output: Any) -> Any:
        result = super().execute_model(scheduler_output)  # type: ignore[misc]
        if not self.use_v2_model_runner:
            for new in scheduler_output.scheduled_new_reqs:
                self._make_earlier_draws(new.req_id)
        return result

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.use_v2_model_runner:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        batch, discarded = self.model_runner.input_batch, self.model_runner.discard_request_mask.np
        with without(batch.generators, discarded[: batch.num_reqs].nonzero()[0].tolist()):
            return super().sample_tokens(grammar_output)  # type: ignore[misc]

    def _make_earlier_draws(self, req_id: str) -> None:
        request = self.model_runner.requests[req_id]
        draws = _output_tokens(request)
        if draws and request.generator is not None:
            advance(request.generator, draws, self._draw)

    def _draw(self, generator: Any) -> None:
        """As vLLM draws for one request; what comes out does not matter."""
        import torch

        logits = torch.zeros((1, self.model_config.get_vocab_size()), device=self.device)
        self.model_runner.sampler.topk_topp_sampler(logits, {0: generator}, None, None)

    def _count_earlier_output(
        self, sampler: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the sampler runs: the output made elsewhere goes in front of that made here."""
        metadata = kwargs["sampling_metadata"]
        earlier = {} if metadata.no_penalties else self._earlier_outputs()
        if not earlier:
            return None
        counted = with_earlier(metadata.output_token_ids, earlier)
        return args, {**kwargs, "sampling_metadata": replace(metadata, output_token_ids=counted)}

    def _earlier_outputs(self) -> dict[int, list[int]]:
        """By batch row, of requests that were begun elsewhere."""
        requests = enumerate(self.model_runner.requests[req_id] for req_id in self.model_runner.input_batch.req_ids)
        return {row: request.prompt_token_ids[-many:] for row, request in requests if (many := _output_tokens(request))}


@contextmanager
def without(generators: dict[int, Any], rows: Sequence[int]) -> Iterator[None]:
    """Takes the generators of these rows out for a while."""
    taken = {row: generators.pop(row) for row in rows if row in generators}
    try:
        yield
    finally:
        generators.update(taken)


def with_earlier(outputs: Sequence[list[int]], earlier: Mapping[int, list[int]]) -> list[list[int]]:
    return [[*earlier.get(row, ()), *output] for row, output in enumerate(outputs)]


def advance(generator: Any, draws: int, draw: Draw) -> None:
    """Moves the generator as `draws` calls of `draw` would, in a time that hardly depends on how many."""
    if generator.device.type == "cpu":
        _advance_cpu(generator, draws, draw)
        return
    before = generator.get_offset()
    draw(generator)
    generator.set_offset(before + draws * (generator.get_offset() - before))


def _advance_cpu(generator: Any, draws: int, draw: Draw) -> None:
    """A CPU generator has no offset. Where one draw proves to take one integer, all are taken at once: with a large
    vocabulary vLLM's sampler takes a millisecond for each."""
    import torch

    twin = generator.clone_state()
    draw(generator)
    torch.randint(_CPU_SEEDS, (1,), generator=twin)
    if torch.equal(twin.get_state(), generator.get_state()):
        torch.randint(_CPU_SEEDS, (draws - 1,), generator=generator)
        return
    for _ in range(draws - 1):
        draw(generator)


def _output_tokens(request: Any) -> int:
    params = request.sampling_params
    return int((params.extra_args or {}).get(_OUTPUT_TOKENS, 0)) if params is not None else 0
