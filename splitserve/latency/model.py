"""What an engine step costs: the protocol that routing, the simulated engine and the planner ask.

Pure values; implementations live beside this file. It is not a scheduler: what goes into a step is decided elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """`tokens` of one prompt computed in a step, after `context` tokens that were computed before."""

    tokens: int
    context: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step. `decodes` has the context length, in tokens, of each sequence that makes a token."""

    prefills: Sequence[PrefillChunk] = ()
    decodes: Sequence[int] = ()


class LatencyModel(Protocol):
    """Predicts; it never fails and never measures."""

    def step_s(self, step: Step) -> float:
        """Seconds that the step takes; 0 for an empty step."""
