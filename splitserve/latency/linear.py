"""The simplest latency model: a step's cost is a sum of a fixed term and terms per token.

    step_s = fixed_s + prefill_token_s * (prompt tokens) + decode_token_s * (decoding sequences)
           + context_token_s * (context tokens that the decoding sequences read)

The context of a prefill chunk costs nothing here: at the prompt lengths that this model is meant for, attention is a
small part of a prefill beside its linear layers. A profile that knows better implements the same protocol.
"""

from dataclasses import dataclass

from splitserve.core.config import SimSettings
from splitserve.latency.model import Step


@dataclass(frozen=True, slots=True)
class LinearLatency:
    """All coefficients in seconds."""

    fixed_s: float
    prefill_token_s: float
    decode_token_s: float
    context_token_s: float = 0.0

    @classmethod
    def of(cls, settings: SimSettings) -> "LinearLatency":
        """The model that a simulated engine's settings describe."""
        return cls(settings.step_s, settings.prefill_token_s, settings.decode_token_s, settings.context_token_s)

    def step_s(self, step: Step) -> float:
        if not step.prefills and not step.decodes:
            return 0.0
        prompt_tokens = sum(chunk.tokens for chunk in step.prefills)
        return (
            self.fixed_s
            + self.prefill_token_s * prompt_tokens
            + self.decode_token_s * len(step.decodes)
            + self.context_token_s * sum(step.decodes)
        )
