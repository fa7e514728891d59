"""The one definition of TTFT, TPOT, ITL, attainment and goodput, for simulated and measured timelines alike.

Goodput is the highest arrival rate whose attainment is at least the target; who finds that rate (planner, benchmark)
compares `attainment` with `Slo.attainment`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Timeline:
    """When one request's tokens came out. Times are seconds on one clock; `finished` is False if it failed."""

    arrival: float
    tokens: tuple[float, ...]
    finished: bool = True
    prompt_tokens: int = 0

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

    @property
    def itl_p99_s(self) -> float:
        """What 99% of the gaps between its tokens are no longer than; 0 for a single token."""
        gaps = sorted(self.itl_s)
        return gaps[rank_of_p99(len(gaps)) - 1] if gaps else 0.0


CountT = TypeVar("CountT", int, npt.NDArray[np.int64])


def rank_of(percent: int, count: CountT) -> CountT:
    """Which of so many values, the smallest being 1, is this percentile: the smallest that so many per cent are no
    larger than."""
    return -(-count * percent // 100)


def rank_of_p99(gaps: CountT) -> CountT:
    """Which of so many gaps, the shortest being 1, is the 99th percentile. Of fewer than 100 it is the longest."""
    return rank_of(99, gaps)


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Of at least one value, the smallest first."""
    return ordered[rank_of(percent, len(ordered)) - 1]


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives in seconds, met jointly by a share `attainment` of the requests. A request may take `ttft_s` and, for
    each token of its prompt, `ttft_per_token_s` to its first token. `itl_p99_s` bounds the 99th percentile of the gaps
    between its tokens, of which TPOT is only the mean."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.9
    ttft_per_token_s: float = 0.0
    itl_p99_s: float = math.inf

    def met_by(self, timeline: Timeline) -> bool:
        return timeline.finished and self.allows(
            timeline.prompt_tokens, timeline.ttft_s, timeline.tpot_s, timeline.itl_p99_s
        )

    def allows(self, prompt_tokens: int, ttft_s: float, tpot_s: float, itl_p99_s: float) -> bool:
        """Whether a request that finished met every objective."""
        in_time = ttft_s <= self.first_token_s(prompt_tokens)
        return in_time and tpot_s <= self.tpot_s and itl_p99_s <= self.itl_p99_s

    def first_token_s(self, prompt_tokens: int) -> float:
        """How long a prompt of that length may take to its first token."""
        return self.ttft_s + self.ttft_per_token_s * prompt_tokens


@dataclass(frozen=True, slots=True)
class Timelines:
    """Many requests' timelines as columns of float64, seconds on one clock; inf where something never came.
    `first_token` and `last_token` are when a request's first and last token came out. The last two columns are there
    where they are known; objectives that need them can't be judged without."""

    arrival: npt.NDArray[np.float64]
    first_token: npt.NDArray[np.float64]
    last_token: npt.NDArray[np.float64]
    output_tokens: npt.NDArray[np.int64]
    prompt_tokens: npt.NDArray[np.int64] | None = None
    itl_p99_s: npt.NDArray[np.float64] | None = None

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
        """Which requests meet all objectives. Raises ValueError for one that needs a column that is not known."""
        met = (self.ttft_s <= self.ttft_objective_s(slo)) & (self.tpot_s <= slo.tpot_s)
        if math.isinf(slo.itl_p99_s):
            return met
        if self.itl_p99_s is None:
            raise ValueError("itl_p99_s can't be judged: of these requests only the first and last token are known")
        return np.asarray(met & (self.itl_p99_s <= slo.itl_p99_s))

    def ttft_objective_s(self, slo: Slo) -> float | npt.NDArray[np.float64]:
        """Of each request, or of all alike. Raises ValueError if it needs lengths that are not known."""
        if not slo.ttft_per_token_s:
            return slo.ttft_s
        if self.prompt_tokens is None:
            raise ValueError("ttft_per_token_s can't be judged: the prompts' lengths are not known")
        return np.asarray(slo.ttft_s + slo.ttft_per_token_s * self.prompt_tokens)


def attainment(timelines: Iterable[Timeline] | Timelines, slo: Slo) -> float:
    """Share of requests that meet all objectives; a failed request meets none. 1.0 when there are none."""
    if isinstance(timelines, Timelines):
        return float(timelines.met(slo).mean()) if len(timelines) else 1.0
    judged = [slo.met_by(timeline) for timeline in timelines]
    return sum(judged) / len(judged) if judged else 1.0
