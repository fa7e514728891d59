"""The one definition of TTFT, TPOT, attainment and goodput, for simulated and measured timelines alike."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timeline:
    """When one request's tokens came out. Times are seconds on one clock; `finished` is False if it failed."""

    arrival: float
    tokens: tuple[float, ...]
    finished: bool = True

    @property
    def ttft_s(self) -> float:
        """Time to first token; infinite if there was none."""
        return self.tokens[0] - self.arrival if self.tokens else float("inf")

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 for a single token."""
        if len(self.tokens) < 2:
            return 0.0
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Each gap between tokens."""
        return tuple(b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False))


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives in seconds, met jointly."""

    ttft_s: float
    tpot_s: float

    def met_by(self, timeline: Timeline) -> bool:
        return timeline.finished and timeline.ttft_s <= self.ttft_s and timeline.tpot_s <= self.tpot_s


def attainment(timelines: Iterable[Timeline], slo: Slo) -> float:
    """Share of requests that meet both objectives; a failed request meets none. 1.0 when there are none."""
    judged = [slo.met_by(timeline) for timeline in timelines]
    return sum(judged) / len(judged) if judged else 1.0
