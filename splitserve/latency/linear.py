"""The simplest latency model: a step's cost is a sum of a fixed term and terms per token.

    step_s = fixed_s + prefill_token_s * (prompt tokens) + prefill_pair_s * (prompt pairs)
           + decode_token_s * (decoding sequences) + context_token_s * (context tokens that those read)

Linear layers cost per token, attention per pair of tokens; the fixed term is the weights' reading and the engine's own.
"""

from dataclasses import dataclass

from splitserve.core.config import SimSettings
from splitserve.latency.model import Provenance, Step, Trust

_GIVEN = Provenance(Trust.ANALYTIC, "coefficients given")


@dataclass(frozen=True, slots=True)
class LinearLatency:
    """All coefficients in seconds, of one pass through all `stages`, which are equally long."""

    fixed_s: float
    prefill_token_s: float
    decode_token_s: float
    context_token_s: float = 0.0
    prefill_pair_s: float = 0.0
    stages: int = 1
    known_by: Provenance = _GIVEN

    @classmethod
    def of(cls, settings: SimSettings) -> "LinearLatency":
        """The model that a simulated engine's settings describe."""
        return cls(settings.step_s, settings.prefill_token_s, settings.decode_token_s, settings.context_token_s)

    def step_s(self, step: Step) -> float:
        if not step.prefills and not step.decodes:
            return 0.0
        return (
            self.fixed_s
            + self.prefill_token_s * step.prompt_tokens
            + self.prefill_pair_s * step.prompt_pairs
            + self.decode_token_s * step.decodes
            + self.context_token_s * step.context_tokens
        )

    def stage_s(self, step: Step) -> float:
        return self.step_s(step) / self.stages

    def provenance(self, step: Step) -> Provenance:
        return self.known_by
