"""The one definition of TTFT, TPOT, attainment and goodput, for simulated and measured timelines alike.

Goodput is the highest arrival rate whose attainment is at least the target; who finds that rate (planner, benchmark)
compares `attainment` with `Slo.attainment`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
    """Objectives in seconds, met jointly by a share `attainment` of the requests."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.9

    def met_by(self, timeline: Timeline) -> bool:
        return timeline.finished and timeline.ttft_s <= self.ttft_s and timeline.tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Timelines:
    """Many requests' timelines as columns of float64, seconds on one clock; inf where something never came.
    `first_token` and `last_token` are when a request's first and last token came out."""

    arrival: npt.NDArray[np.float64]
    first_token: npt.NDArray[np.float64]
    last_token: npt.NDArray[np.float64]
    output_tokens: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def ttft_s(self) -> npt.NDArray[np.float64]:
        return self.first_token - self.arrival

    @property
    def tpot_s(self) -> npt.NDArray[np.float64]:
        """0 for a single token; inf for a request that did not end."""
        gaps = np.maximum(self.output_tokens - 1, 1)
        tpot = np.full(len(self), np.inf)
        ended = np.isfinite(self.last_token)
        tpot[ended] = (self.last_token[ended] - self.first_token[ended]) / gaps[ended]
        return tpot

    def met(self, slo: Slo) -> npt.NDArray[np.bool_]:
        """Which requests meet both objectives."""
        return (self.ttft_s <= slo.ttft_s) & (self.tpot_s <= slo.tpot_s)


def attainment(timelines: Iterable[Timeline] | Timelines, slo: Slo) -> float:
    """Share of requests that meet both objectives; a failed request meets none. 1.0 when there are none."""
    if isinstance(timelines, Timelines):
        return float(timelines.met(slo).mean()) if len(timelines) else 1.0
    judged = [slo.met_by(timeline) for timeline in timelines]
    return sum(judged) / len(judged) if judged else 1.0
