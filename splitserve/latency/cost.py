"""A latency model as plain coefficients, which a worker says of itself and a router works with."""

from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache

from splitserve.core.worker import StepCost
from splitserve.latency.fit import FittedLatency, Sample, fit
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import LatencyModel, PrefillChunk, Step

_NAMES = tuple(field.name for field in fields(StepCost))
_CHUNKS = (64, 128, 256, 512, 1024, 2048, 4096)  # tokens
_CONTEXTS = (0, 512, 2048, 8192)  # tokens of a prompt before a chunk, or of a sequence
_DECODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def cost_of(latency: LatencyModel) -> StepCost:
    """Exact for fitted and linear models; of others what fits their steps best."""
    if isinstance(latency, LinearLatency):
        return StepCost(
            fixed_s=latency.fixed_s,
            prefill_fixed_s=0.0,
            token_s=latency.prefill_token_s,
            token_break=float("inf"),
            token_more_s=0.0,
            pair_s=latency.prefill_pair_s,
            chunk_s=0.0,
            decode_s=latency.decode_token_s,
            decode_break=float("inf"),
            decode_more_s=0.0,
            context_s=latency.context_token_s,
            stages=latency.stages,
        )
    fitted = latency if isinstance(latency, FittedLatency) else fit(_samples(latency), "approximated", latency.stages)
    return StepCost(**{name: getattr(fitted, name) for name in _NAMES})


@lru_cache(maxsize=256)
def latency_of(cost: StepCost) -> FittedLatency:
    """What `cost_of` was taken of. The same object for workers that cost the same: what is worked out once per model
    (`routing/adaptive`) is worked out once for all of them."""
    terms = {name: getattr(cost, name) for name in _NAMES}
    return FittedLatency(**terms, source="the worker's own word", held_out=(), hull=())


def _samples(latency: LatencyModel) -> Iterator[Sample]:
    for step in _steps():
        yield Sample(step, latency.step_s(step))


def _steps() -> Iterator[Step]:
    for context in _CONTEXTS:
        for tokens in _CHUNKS:
            yield Step.of([PrefillChunk(tokens, context)])
            yield Step.of([PrefillChunk(tokens, context)], [context + 1] * 16)
        for decodes in _DECODES:
            yield Step.of(decodes=[context + 1] * decodes)
