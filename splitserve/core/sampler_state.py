"""What a sampler carries from one token to the next, besides the tokens: what a request takes along to another worker.
Pure.

It follows from the request's sampling parameters and its output so far, which a `DecodeJob` has anyway: nothing else
travels. Each engine brings its own sampler into this state before the first token that it makes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from splitserve.core.request import SamplingParams

OUTPUT_PENALTIES = ("presence_penalty", "frequency_penalty")  # they count output tokens, not the prompt's
GRAMMAR = "structured_output"
STATEFUL = frozenset({"seed", GRAMMAR, *OUTPUT_PENALTIES})  # SamplingParams fields that depend on the output so far


@dataclass(frozen=True, slots=True)
class SamplerState:
    """`output_tokens`: made so far. `fields`: those of STATEFUL that the request uses, once there is output. A seeded
    generator has made one draw per output token; a grammar has accepted them all."""

    output_tokens: int
    fields: tuple[str, ...]

    @classmethod
    def of(cls, sampling: SamplingParams, output: Sequence[int]) -> "SamplerState":
        seeded = ("seed",) if sampling.seed is not None and sampling.temperature > 0 else ()
        penalties = tuple(name for name in OUTPUT_PENALTIES if getattr(sampling, name) != 0)
        grammar = (GRAMMAR,) if sampling.structured_output is not None else ()
        return cls(len(output), (*seeded, *penalties, *grammar) if output else ())

    def lost_on(self, restores: Collection[str]) -> tuple[str, ...]:
        """The fields whose state is lost on an engine that can take up the state of `restores` alone."""
        return tuple(name for name in self.fields if name not in restores)
