"""What an engine step costs: the protocol that routing, the simulated engine and the planner ask.

Pure values; implementations live beside this file. It is not a scheduler: what goes into a step is decided elsewhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """`tokens` of one prompt computed in a step, after `context` tokens that were computed before."""

    tokens: int
    context: int = 0


class Step(NamedTuple):
    """One engine step, as the sums that its cost depends on.

    `prompt_pairs` counts what the attention of the prefill chunks visits: each of a chunk's tokens meets every token
    before it and itself, so a chunk of t tokens after c has t * c + t * (t + 1) / 2 pairs.
    """

    prompt_tokens: int = 0  # of all chunks
    prompt_pairs: int = 0
    prefills: int = 0  # chunks
    decodes: int = 0  # sequences that make one token each
    context_tokens: int = 0  # that those read

    @classmethod
    def of(cls, prefills: Iterable[PrefillChunk] = (), decodes: Sequence[int] = ()) -> "Step":
        """From chunks, and the context length of each decoding sequence in tokens."""
        chunks = list(prefills)
        return cls(
            prompt_tokens=sum(chunk.tokens for chunk in chunks),
            prompt_pairs=sum(pairs(chunk.tokens, chunk.context) for chunk in chunks),
            prefills=len(chunks),
            decodes=len(decodes),
            context_tokens=sum(decodes),
        )


def pairs(tokens: int, context: int) -> int:
    """What the attention of one chunk visits, in pairs of tokens."""
    return tokens * context + tokens * (tokens + 1) // 2


class Trust(StrEnum):
    """How an estimate was come by, the most trusted first."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    EXTRAPOLATED = "extrapolated"
    ANALYTIC = "analytic"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an estimate comes from. `error` is the source's own held-out mean relative error (0.05 is 5%), None where
    nobody has measured it."""

    trust: Trust
    source: str
    error: float | None = None


class StepLatency(Protocol):
    """What an engine that takes its time from a model needs."""

    def step_s(self, step: Step) -> float:
        """Seconds from the step's start to its tokens, through all stages; 0 for an empty step."""


class LatencyModel(StepLatency, Protocol):
    """Of one worker, whatever its parallelism. Predicts; it never fails and never measures."""

    @property
    def stages(self) -> int:
        """Pipeline stages: that many batches may be under way at once."""

    def stage_s(self, step: Step) -> float:
        """Seconds of the slowest stage: how soon another batch of this kind may follow. `step_s` for one stage."""

    def provenance(self, step: Step) -> Provenance:
        """How `step_s` knows."""
