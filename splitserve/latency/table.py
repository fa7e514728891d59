"""A latency model made of curves: what a table of measured steps becomes. Pure values.

    prefill = base(prompt tokens) + crowd(prompts of `crowd_tokens`) + length(pairs)
    decode  = batch(sequences) + read(tokens read)
    both    = base(prompt tokens + sequences) + crowd + length + read, at least what its decodes cost alone

In a step of both, decodes ride as tokens in the linear layers and their attention is added. No table here measured
that: extrapolated. A sum of curves that never fall never falls, whichever part of the work grows.
"""

from dataclasses import dataclass, replace

from splitserve.latency.checks import Finding
from splitserve.latency.curves import Curve
from splitserve.latency.model import Provenance, Step, Trust

NOTHING = Curve.through([0.0], [0.0])


@dataclass(frozen=True, slots=True)
class Hull:
    """What the table covers; a step outside is extrapolated."""

    fewest_prompt_tokens: int
    most_prompt_tokens: int
    most_prompts: int
    most_decodes: int
    longest_context: int  # of a sequence

    def covers(self, step: Step) -> bool:
        """Whether the step is prefill or decode alone, and within."""
        if step.prompt_tokens and step.decodes:
            return False
        if step.prompt_tokens:
            within = self.fewest_prompt_tokens <= step.prompt_tokens <= self.most_prompt_tokens
            return within and step.prefills <= self.most_prompts
        return step.decodes <= self.most_decodes and step.context_tokens <= self.longest_context * step.decodes


@dataclass(frozen=True, slots=True)
class TableLatency:
    """One worker. Curves give seconds of a pass through all `stages`, which are equally long but for the hop."""

    base: Curve
    length: Curve
    batch: Curve
    read: Curve
    hull: Hull
    source: str
    crowd: Curve = NOTHING
    crowd_tokens: int = 1
    stages: int = 1
    hop_s: float = 0.0  # from a stage to the next
    hop_token_s: float = 0.0
    error: float | None = None
    findings: tuple[Finding, ...] = ()

    def step_s(self, step: Step) -> float:
        seconds = self._layers_s(step)
        if self.stages == 1 or not seconds:
            return seconds
        return seconds + (self.stages - 1) * (self.hop_s + self.hop_token_s * (step[0] + step[3]))

    def stage_s(self, step: Step) -> float:
        seconds = self._layers_s(step)
        if self.stages == 1 or not seconds:
            return seconds
        return seconds / self.stages + self.hop_s + self.hop_token_s * (step[0] + step[3])

    def _layers_s(self, step: Step) -> float:
        tokens, pairs, prefills, decodes, context = step
        if not tokens:
            return self.batch.of(decodes) + self.read.of(context) if decodes else 0.0
        read = self.read.of(context)
        seconds = self.base.of(tokens + decodes) + self.length.of(pairs) + read
        if self.crowd is not NOTHING:
            full = tokens / self.crowd_tokens
            seconds += self.crowd.of(prefills if prefills < full else full)
        if decodes:
            alone = self.batch.of(decodes) + read
            return seconds if seconds > alone else alone
        return seconds

    def provenance(self, step: Step) -> Provenance:
        trust = Trust.INTERPOLATED if self.hull.covers(step) else Trust.EXTRAPOLATED
        return Provenance(trust, self.source, self.error)

    def staged(self, stages: int, hop_s: float, hop_token_s: float) -> "TableLatency":
        """The same layers cut into equal pipeline stages."""
        return replace(self, stages=stages, hop_s=hop_s, hop_token_s=hop_token_s)
